"""Search by Ray Tune over the keys of a recipe; a stage that several trials share is run once."""
