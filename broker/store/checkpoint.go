package store

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/objstorage/objstorageprovider"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// checkpointFile is the table that a checkpoint writes. Its name is not a
// table's: until Pebble has taken it, it is no part of the store.
const checkpointFile = "checkpoint.new"

// Checkpoint stores many messages at once and returns nil once the disk has
// them. It does what a synced batch does for a fraction of the bytes: they are
// written once, compressed, as a table, and not to the log first. It also makes
// everything durable that was committed before without sync, so that what a
// crash leaves is never a newer reading beside an older deletion that came to
// nothing.
//
// Of two messages with one topic the later one counts. An empty payload is an
// error: a deletion belongs into a [Batch]. A call and a Commit that change the
// same topic must not run at the same time: which of them wins is not defined.
func (s *Store) Checkpoint(rs []Retained) error {
	if len(rs) == 0 {
		return nil
	}
	if err := s.Err(); err != nil {
		return err
	}
	order := make([]int, len(rs))
	for i := range rs {
		if len(rs[i].Payload) == 0 {
			return fmt.Errorf("store %s: checkpoint: topic %q has no payload", s.dir, rs[i].Topic)
		}
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return strings.Compare(rs[a].Topic, rs[b].Topic) })
	err := s.guard(func() error {
		s.checkpointing.Lock()
		defer s.checkpointing.Unlock()
		return s.ingest(rs, order)
	})
	switch {
	case err == nil || errors.Is(err, ErrFailed):
		return err
	case errors.Is(err, syscall.ENOSPC):
		return fmt.Errorf("store %s: checkpoint: %w: %w; make room, it is tried again", s.dir, ErrDiskFull, err)
	default:
		return fmt.Errorf("store %s: checkpoint: %w", s.dir, err)
	}
}

// ingest writes the messages as a table and hands it to Pebble.
func (s *Store) ingest(rs []Retained, order []int) (err error) {
	if s.unsynced.Swap(false) {
		if err := s.db.LogData(nil, pebble.Sync); err != nil {
			s.unsynced.Store(true)
			return err
		}
	}
	path := filepath.Join(s.dir, checkpointFile)
	f, err := s.fs.Create(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = s.fs.Remove(path)
		}
	}()
	w := sstable.NewWriter(objstorageprovider.NewFileWritable(f), s.tables)
	bytes := 0
	for i, at := range order {
		if i+1 < len(order) && rs[order[i+1]].Topic == rs[at].Topic {
			continue
		}
		k, v := key(keyRetained, rs[at].Topic), encodeRetained(rs[at])
		bytes += len(k) + len(v)
		if err := w.Set(k, v); err != nil {
			return errors.Join(err, w.Close())
		}
	}
	s.written.Add(int64(bytes))
	s.put.Add(uint64(bytes))
	if err := w.Close(); err != nil { // it syncs the file
		return err
	}
	return s.db.Ingest(context.Background(), []string{path})
}
