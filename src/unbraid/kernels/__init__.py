"""The sparse operations that cost time, each beside a slow twin it is tested against."""
