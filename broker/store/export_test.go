package store

import (
	"context"
	"slices"
	"time"
)

// Format is the version of the keys and values.
const Format = format

// For the tests of the records' form.
var (
	DecodeRetained = decodeRetained
	EncodeRetained = encodeRetained
	DecodeRecord   = decodeRecord
)

// Spaces are the first bytes of all keys.
func Spaces() []byte {
	var out []byte
	for b := range spaces {
		out = append(out, b)
	}
	return out
}

// Settle waits until no flush and no compaction runs or is due.
func Settle(s *Store) {
	for quiet := 0; quiet < 3; {
		m := s.db.Metrics()
		if m.Compact.NumInProgress > 0 || m.Flush.NumInProgress > 0 || m.MemTable.Count > 1 {
			quiet = 0
		} else {
			quiet++
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// Flush moves what the log holds into a table.
func Flush(s *Store) error { return s.db.Flush() }

// Compact compacts everything.
func Compact(s *Store) error {
	return s.db.Compact(context.Background(), []byte{0}, []byte{0xff}, false)
}

// PutRaw stores any bytes under any key.
func PutRaw(s *Store, k, v []byte) error { return s.db.Set(k, v, nil) }

// Key is a record's key.
var Key = key

// EachRaw calls fn for every record, which is fn's to keep.
func EachRaw(s *Store, fn func(k, v []byte)) error {
	it, err := s.db.NewIter(nil)
	if err != nil {
		return err
	}
	for ok := it.First(); ok; ok = it.Next() {
		fn(slices.Clone(it.Key()), slices.Clone(it.Value()))
	}
	return closeIter(it)
}
