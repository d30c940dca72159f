package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/wal"
)

// RepairReport is what [Repair] did.
type RepairReport struct {
	Dir string `json:"dir"`
	// Kept is where the damaged store is now, all of it.
	Kept string `json:"kept"`
	// From says what the records were read from: "store", or, where that could
	// not be opened, "tables" and "logs".
	From []string `json:"from"`
	// Salvaged counts the records of the new store, Dropped those that could be
	// read but not decoded, by key space.
	Salvaged map[string]int `json:"salvaged"`
	Dropped  map[string]int `json:"dropped"`
	// Lost are what could not be read: key ranges, tables, the rest of a log. At
	// most 100; MoreLost counts the rest.
	Lost     []Damage `json:"lost"`
	MoreLost int      `json:"moreLost,omitempty"`
}

func (r *RepairReport) lost(where string, err error) {
	if len(r.Lost) >= maxDamage {
		r.MoreLost++
		return
	}
	r.Lost = append(r.Lost, Damage{Where: where, Problem: problem(err)})
}

// Repair builds a new store of all records of a damaged one that can be read,
// and puts it in its place; the damaged one is kept under a new name. Nothing is
// changed in its files. The store must not be open.
//
// Where Pebble can open the store, every record that is readable has its last
// value. Where it cannot, because the manifest, a log or a table is damaged as a
// whole, the tables are read from the newest to the oldest and the logs after
// them: a record may then have an older value than it had, or be back although it
// was deleted. The digests, and for readings the mappers, put that right.
func Repair(dir string, progress func(records int)) (r RepairReport, err error) {
	r = RepairReport{Dir: dir, Salvaged: map[string]int{}, Dropped: map[string]int{}}
	if err := exists(dir); err != nil {
		return r, err
	}
	now := time.Now().UTC().Format("20060102T150405.000000")
	tmp := fmt.Sprintf("%s.repairing-%s", dir, now)
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("repair: %w", err), os.RemoveAll(tmp))
		}
	}()
	if err := salvage(&r, dir, tmp, progress); err != nil {
		return r, err
	}
	kept := fmt.Sprintf("%s.damaged-%s", dir, now)
	if err := os.Rename(dir, kept); err != nil {
		return r, err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return r, errors.Join(err, os.Rename(kept, dir))
	}
	r.Kept = kept
	return r, syncFolder(filepath.Dir(filepath.Clean(dir)))
}

// salvager copies records into a new store.
type salvager struct {
	r        *RepairReport
	to       *Store
	batch    *pebble.Batch
	n        int
	progress func(int)
}

// salvage fills a new store at tmp.
func salvage(r *RepairReport, dir, tmp string, progress func(int)) (err error) {
	from, err := openReadOnly(dir)
	if err != nil && !Corrupt(err) {
		return err
	}
	if err != nil {
		r.lost("store", err)
	}
	defer func() { err = errors.Join(err, from.closeReadOnly()) }()
	var lock io.Closer
	if from == nil {
		if lock, err = pebble.LockDirectory(dir, vfs.Default); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, lock.Close()) }()
	}
	to, err := open(tmp, Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	s := &salvager{r: r, to: to, progress: progress}
	defer func() { err = errors.Join(err, to.Close()) }()
	err = to.guard(func() error {
		if from != nil {
			r.From = []string{"store"}
			return s.all(func() (*pebble.Iterator, error) { return from.db.NewIter(nil) })
		}
		r.From = []string{"tables", "logs"}
		return errors.Join(s.tables(dir), s.logs(dir))
	})
	if err != nil {
		return err
	}
	// A record that came from a table and from a log is there twice, and what is
	// removed with a SingleDelete must be there once.
	if err := to.guard(func() error {
		return to.db.Compact(context.Background(), []byte{0}, []byte{0xff}, false)
	}); err != nil {
		return err
	}
	r.Salvaged, err = to.Counts()
	delete(r.Salvaged, spaceName(keyFormat[0]))
	return err
}

// tables salvages what the tables hold, without the manifest that orders them.
func (s *salvager) tables(dir string) error {
	files, err := tableFiles(dir)
	if err != nil {
		return err
	}
	var good []string
	for _, f := range files {
		t, err := openTable(filepath.Join(dir, f))
		if err != nil {
			s.r.lost(f, err)
			continue
		}
		if err := t.Close(); err != nil {
			return err
		}
		good = append(good, f)
	}
	if len(good) == 0 {
		return nil
	}
	return s.all(func() (*pebble.Iterator, error) {
		levels := make([][]sstable.ReadableFile, len(good))
		for i, f := range good {
			file, err := vfs.Default.Open(filepath.Join(dir, f))
			if err != nil {
				return nil, err
			}
			levels[i] = []sstable.ReadableFile{file}
		}
		po := &pebble.Options{}
		po.EnsureDefaults()
		return pebble.NewExternalIter(po, &pebble.IterOptions{KeyTypes: pebble.IterKeyTypePointsOnly}, levels)
	})
}

// all copies everything that the iterators of open can read. An iterator stops
// at a block that it cannot read; the next one begins at a key beyond it, and
// what lies between the block and that key is read backwards.
func (s *salvager) all(open func() (*pebble.Iterator, error)) error {
	var last, seek []byte // the greatest key that was read; where reading began
	for {
		it, err := open()
		if err != nil {
			return err
		}
		for ok := it.SeekGE(seek); ok; ok = it.Next() {
			last = append(last[:0], it.Key()...)
			if err := s.put(it.Key(), it.Value()); err != nil {
				return errors.Join(err, it.Close())
			}
		}
		damage := it.Error()
		_ = it.Close() // it gives the same error
		if damage == nil {
			return s.flush()
		}
		if bytes.Compare(last, seek) < 0 {
			last = append(last[:0], seek...)
		}
		next, err := beyond(open, last)
		if err != nil {
			return err
		}
		from, err := s.backwards(open, next, last)
		if err != nil {
			return err
		}
		s.r.lost(keyRange(last, from), damage)
		if next == nil {
			return s.flush()
		}
		seek = next
	}
}

// beyond finds a place after the given key at which reading works again, the
// closer the better; nil for none. It steps over the keys that share the first
// n bytes, for smaller and smaller n.
func beyond(open func() (*pebble.Iterator, error), key []byte) ([]byte, error) {
	if len(key) == 0 {
		key = []byte{0}
	}
	for n := len(key); n > 0; n-- {
		target := slices.Clone(key[:n])
		for step := byte(1); target[n-1] < 0xff; step *= 2 {
			target[n-1] += min(step, 0xff-target[n-1])
			it, err := open()
			if err != nil {
				return nil, err
			}
			it.SeekGE(target)
			works := it.Error() == nil
			_ = it.Close() // it gives the same error
			if works {
				return target, nil
			}
		}
	}
	return nil, nil
}

// backwards copies what can be read before a key, or from the end, down to
// another, and gives the least key that it read.
func (s *salvager) backwards(open func() (*pebble.Iterator, error), from, to []byte) ([]byte, error) {
	least := from
	it, err := open()
	if err != nil {
		return nil, err
	}
	ok := from == nil && it.Last() || from != nil && it.SeekLT(from)
	for ; ok && bytes.Compare(it.Key(), to) > 0; ok = it.Prev() {
		least = slices.Clone(it.Key())
		if err := s.put(it.Key(), it.Value()); err != nil {
			return nil, errors.Join(err, it.Close())
		}
	}
	_ = it.Close() // its error is the damage
	return least, nil
}

func keyRange(after, before []byte) string {
	show := func(k []byte) string {
		if len(k) == 0 {
			return "the begin"
		}
		return fmt.Sprintf("%s %s", spaceName(k[0]), keyText(k[1:]))
	}
	if before == nil {
		return fmt.Sprintf("records after %s", show(after))
	}
	return fmt.Sprintf("records between %s and %s", show(after), show(before))
}

// put copies a record, if it is one.
func (s *salvager) put(k, v []byte) error {
	if string(k) == keyFormat {
		return nil // the new store has its own
	}
	if _, err := decodeRecord(k, v); err != nil {
		name := "unknown"
		if len(k) > 0 {
			name = spaceName(k[0])
		}
		s.r.Dropped[name]++
		return nil //nolint:nilerr // it is in the report
	}
	if s.n++; s.progress != nil && s.n%progressEvery == 0 {
		s.progress(s.n)
	}
	if s.batch == nil {
		s.batch = s.to.db.NewBatch()
	}
	if err := s.batch.Set(k, v, nil); err != nil {
		return err
	}
	if s.batch.Len() < 256<<10 {
		return nil
	}
	return s.flush()
}

func (s *salvager) flush() error {
	if s.batch == nil {
		return nil
	}
	if err := s.to.Err(); err != nil {
		return err
	}
	s.to.written.Add(int64(s.batch.Len()))
	err := s.batch.Commit(pebble.NoSync)
	err = errors.Join(err, s.batch.Close())
	s.batch = nil
	return err
}

// logs applies what the logs hold on top of the tables, each up to its damage.
func (s *salvager) logs(dir string) error {
	logs, err := wal.Scan(wal.Dir{FS: vfs.Default, Dirname: dir})
	if err != nil {
		return err
	}
	for _, l := range logs {
		if err := s.log(l); err != nil {
			return err
		}
	}
	return s.flush()
}

func (s *salvager) log(l wal.LogicalLog) (err error) {
	r := l.OpenForRead()
	defer func() { err = errors.Join(err, r.Close()) }()
	for {
		rec, at, err := r.NextRecord()
		if errors.Is(err, io.EOF) {
			return nil
		}
		var repr []byte
		if err == nil {
			repr, err = io.ReadAll(rec)
		}
		if err != nil {
			// An end that a power cut tore off looks like this as well.
			s.r.lost(fmt.Sprintf("%s from byte %d on", l.Num, at.Physical), err)
			return nil
		}
		if err := s.apply(repr); err != nil {
			s.r.lost(fmt.Sprintf("%s at byte %d", l.Num, at.Physical), err)
		}
	}
}

// apply copies the changes of a batch as it stands in a log.
func (s *salvager) apply(repr []byte) error {
	var b pebble.Batch
	if err := b.SetRepr(repr); err != nil {
		return err
	}
	for r := b.Reader(); ; {
		kind, k, v, ok, err := r.Next()
		if err != nil || !ok {
			return err
		}
		switch kind {
		case pebble.InternalKeyKindSet:
			if err := s.put(k, v); err != nil {
				return err
			}
		case pebble.InternalKeyKindDelete, pebble.InternalKeyKindSingleDelete:
			if err := s.flush(); err != nil {
				return err
			}
			if err := s.to.db.Delete(k, pebble.NoSync); err != nil {
				return err
			}
		case pebble.InternalKeyKindRangeDelete:
			if err := s.flush(); err != nil {
				return err
			}
			if err := s.to.db.DeleteRange(k, v, pebble.NoSync); err != nil {
				return err
			}
		case pebble.InternalKeyKindLogData:
		default: // a checkpoint's table is listed here; it is read with the other tables
			if !strings.Contains(kind.String(), "INGEST") {
				return fmt.Errorf("a change of the unknown kind %s", kind)
			}
		}
	}
}
