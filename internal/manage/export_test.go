package manage

const MaxAnswers = maxAnswers

// Kept returns the number of entries.
func Kept(a *Answers) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.entries)
}
