"""Model families, one file each: data and small functions that fill an `astracli.models.adapter.ModelAdapter`."""
