"""Which known traps of Grad-CAM tools would have bitten on this network and this scan?

The rule of each tool is stated again and worked out here; none of the tools is needed.
"""
