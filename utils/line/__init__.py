"""Line: a trained model at work on a production line, with or without torch.

What goes to the edge device (``edge_program.MODULES``) imports NumPy, Pillow and onnxruntime only.
"""
