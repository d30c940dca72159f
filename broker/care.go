package broker

import (
	"io"

	"github.com/fairlead-io/fairlead/broker/store"
)

// Backup writes a backup of the store to w while the broker works; see
// [store.Store.Backup].
func (b *Broker) Backup(w io.Writer) error { return b.store.Backup(w, b.opts.Node) }

// StoreStats tells what the store costs the disk.
func (b *Broker) StoreStats() store.Stats { return b.store.Stats() }

// StoreCounts counts the store's records by key space. It reads all keys.
func (b *Broker) StoreCounts() (map[string]int, error) { return b.store.Counts() }
