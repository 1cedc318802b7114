package pgstore

// Queue returns how many calls of Apply wait for a group.
func (b *Backend) Queue() int {
	b.committer.mu.Lock()
	defer b.committer.mu.Unlock()
	return len(b.committer.queue)
}

// AskNext returns how many keys the next question has.
func (b *Backend) AskNext() int {
	b.absence.mu.Lock()
	defer b.absence.mu.Unlock()
	if b.absence.next == nil {
		return 0
	}
	return len(b.absence.next.keys)
}
