"""Short texts of customers, for benchmarks of speed."""

TICKETS = [
    "I was charged twice for the same order this month, please refund one of them.",
    "My parcel has been lost for two weeks and nobody answers.",
    "The invoice shows the wrong address of our company.",
    "Where is the courier? The tracking page has not changed since Monday.",
    "Your system declined my card, but the money is gone.",
    "The box arrived open and half of the order is missing.",
    "Can I pay by bank transfer next time?",
    "Please leave the delivery with my neighbour on the second floor.",
]
