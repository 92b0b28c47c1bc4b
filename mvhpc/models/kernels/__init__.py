"""What makes the networks fast; results change by rounding at most."""
