"""The sinusoid study: methods, training, measuring, figures."""
