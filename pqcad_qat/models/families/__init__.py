"""One file a model family, with all that is known of it; they need numpy alone, since what ships reads them too."""
