"""The job server: a pure core, a journal in front of a store, and an asyncio transport."""
