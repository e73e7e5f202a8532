"""HTTP -> retrieve -> prompt -> generate -> cite. Never imports training: their contract is the registry."""
