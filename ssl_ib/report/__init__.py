"""The page that shows runs: one HTML file that opens without a network, made of panels, a file each in `panels/`."""
