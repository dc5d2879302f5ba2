"""unbraid: train sparse autoencoders whose features come apart."""
