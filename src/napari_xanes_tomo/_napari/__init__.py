"""The napari plugin: reader, sample data, docks. Qt, napari, magicgui and pyqtgraph are imported nowhere else."""
