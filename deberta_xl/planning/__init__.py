"""What a run takes before it has begun (memory, operations, days, disk) as pure functions of its settings and ranks."""
