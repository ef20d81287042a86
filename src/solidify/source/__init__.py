"""Which files a class needs, wherever its source is kept: found, judged, and made flat."""
