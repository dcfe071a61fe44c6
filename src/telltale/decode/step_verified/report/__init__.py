"""Do the signals tell right steps from wrong ones in this pair of models, and does accepting by them pay?"""
