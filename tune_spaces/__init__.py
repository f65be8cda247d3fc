"""Search spaces over recipe keys for Ray Tune. Nothing is here yet: searching comes after the main job."""
