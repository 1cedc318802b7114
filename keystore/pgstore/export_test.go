package pgstore

// AskNext returns how many keys the next question has.
func (b *Backend) AskNext() int {
	b.absence.mu.Lock()
	defer b.absence.mu.Unlock()
	if b.absence.next == nil {
		return 0
	}
	return len(b.absence.next.keys)
}
