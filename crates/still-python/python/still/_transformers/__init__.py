"""The code that lies beside every full student, for `still.torch`: one template, two places."""
