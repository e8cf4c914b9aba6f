"""What ships inside the package: the embedded model, the feature network and the reference statistics, each with its provenance."""
