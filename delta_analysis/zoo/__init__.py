"""The embedded family of trained models: what they learn, from which texts, and how."""
