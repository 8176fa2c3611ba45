"""The pinhole camera model: projection, its derivatives, camera files."""
