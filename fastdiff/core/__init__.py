"""What every op is built from; knows no op."""
