"""Commands of ``resnet-export`` beside the export itself. ``exporter.cli`` registers them."""
