"""Makes datasets: of images, of shards by others, of nothing; and checks them."""
