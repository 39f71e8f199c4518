"""The file formats: one file each; readers have sniff() and read(), writers save()."""
