"""Pictures of layouts and of training steps: the derivation gives what is drawn, matplotlib sets it on paper."""
