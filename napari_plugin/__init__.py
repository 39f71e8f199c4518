"""The napari plugin: a dock, a reader and sample data. napari.yaml says what is where."""
