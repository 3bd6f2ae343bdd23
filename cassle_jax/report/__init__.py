"""What a person sees of a run: contact sheets, figures and one self-contained page."""
