"""mfwm play: a trained world model in a browser, with what it expects at every step."""
