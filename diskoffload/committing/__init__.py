"""What an offloaded model holds, made durable, and taken up again."""
