package console

import (
	"crypto/rand"
	"sync"
	"time"
)

// noteParam is the query parameter with the name of a note.
const noteParam = "note"

const (
	maxNotes = 256
	keepNote = time.Minute
)

// notes are the sentences on what operators have just done. The page after a POST shows the
// sentence. The URL of the page has only the name of the note, so that no link of a stranger makes
// the console say something. The zero notes are empty and ready to use.
type notes struct {
	mu  sync.Mutex // guards all
	all []note     // oldest first
}

type note struct {
	name, actor, text string
	at                time.Time
}

// put keeps a note for an actor, and returns the query that shows the note.
func (n *notes) put(actor, text string) (query string) {
	added := note{rand.Text(), actor, text, time.Now()}
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.all) >= maxNotes {
		n.all = append(n.all[:0], n.all[1:]...)
	}
	n.all = append(n.all, added)
	return "?" + noteParam + "=" + added.name
}

// take returns the text of a note for an actor, or "". The note stays for a reload, for a minute.
func (n *notes) take(name, actor string) string {
	if name == "" {
		return ""
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for len(n.all) > 0 && time.Since(n.all[0].at) > keepNote {
		n.all = append(n.all[:0], n.all[1:]...)
	}
	for _, note := range n.all {
		if note.name == name && note.actor == actor {
			return note.text
		}
	}
	return ""
}
