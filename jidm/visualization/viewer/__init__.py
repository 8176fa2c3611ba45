"""A viewer of decoded and recorded video in the browser; needs the extra `view`."""
