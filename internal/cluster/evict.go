package cluster

import "context"

// evictSilent evicts the members that have sent no heartbeat for 2D(1+rho), see invariant 5. Half
// of the time would be enough. All evictions together have the time of one call, so that a slow
// engine delays the next heartbeat once.
func (m *membership) evictSilent() {
	patience := 2 * Bound(m.freshness)
	if m.cfg.Wrong.has(EvictEarly) {
		patience = m.freshness / 4
	}
	type silent struct {
		key      []byte
		revision uint64
	}
	var all []silent
	m.mu.Lock()
	now := m.cfg.Clock().Mono
	for id, other := range m.members {
		if id != string(m.id[:]) && now-other.lastSeen > int64(patience) {
			all = append(all, silent{append([]byte{memberSpace}, id...), other.revision})
		}
	}
	m.mu.Unlock()
	if len(all) == 0 {
		return
	}
	ctx, cancel := m.limited(m.ctx, m.freshness)
	defer cancel()
	for _, s := range all {
		m.evict(ctx, s.key, s.revision)
	}
}

// evict deletes the record of a member at a revision. A conflict means that another process was
// first, that the member is alive, or that the header has changed. The next round looks again.
func (m *membership) evict(ctx context.Context, key []byte, revision uint64) {
	m.mu.Lock()
	h := m.header
	m.mu.Unlock()
	if m.remove(ctx, key, revision, h) != nil {
		return
	}
	m.mu.Lock()
	m.counts.Evictions++
	m.mu.Unlock()
	m.log.Info("API key store removed a silent process from the membership table")
}
