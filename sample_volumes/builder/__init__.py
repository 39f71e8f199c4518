"""How are the sample volumes and the sample networks made? One module per step."""
