"""An artifact's folder: manifest, model card, witness, graph files."""
