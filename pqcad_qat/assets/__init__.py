"""What ships inside the package: the embedded models, feature networks and reference statistics, each with its
provenance.
"""
