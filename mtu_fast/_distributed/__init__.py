"""Rows of several processes as one set of rows; the only folder that knows `torch.distributed`."""
