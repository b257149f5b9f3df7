"""Built-in real data, paired images and degradations; everything else about data is `timm.data`."""
