package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// maxDamage bounds how many places of damage a report lists one by one.
const maxDamage = 100

var errClosed = errors.New("store closed")

// Report is what [Check] found.
type Report struct {
	Dir string `json:"dir"`
	// Format is the version of the store's keys and values; 0 where it cannot be read.
	Format uint64 `json:"format"`
	// Tables and TableBytes count the table files.
	Tables     int   `json:"tables"`
	TableBytes int64 `json:"tableBytes"`
	// Records counts what can be read and decoded, by key space.
	Records map[string]int `json:"records"`
	// Damage lists what is wrong, at most 100 places; MoreDamage counts the rest.
	Damage     []Damage `json:"damage"`
	MoreDamage int      `json:"moreDamage,omitempty"`
}

// Damage is one thing that is wrong.
type Damage struct {
	// Where is a file of the store, or a key space and key.
	Where   string `json:"where"`
	Problem string `json:"problem"`
}

func (r *Report) damaged(where string, err error) {
	if len(r.Damage) >= maxDamage {
		r.MoreDamage++
		return
	}
	r.Damage = append(r.Damage, Damage{Where: where, Problem: problem(err)})
}

// problem is an error's first line: Pebble's have further ones for its authors.
func problem(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// Check reads all of a store that is not open and changes nothing in it: the
// checksums of every block of every table, the logs, the order of the levels,
// and every record. What is wrong is in the report; an error says that the
// store could not be looked at. progress, which may be nil, is told now and
// then how many records were read.
func Check(dir string, progress func(records int)) (Report, error) {
	r := Report{Dir: dir, Records: map[string]int{}}
	if err := exists(dir); err != nil {
		return r, err
	}
	probe := &Store{dir: dir, fs: vfs.Default}
	if _, err := probe.compareClean(); err != nil {
		if !errors.Is(err, errCorrupt) {
			return r, err
		}
		r.damaged(cleanFile, errors.New("the files are not those of the store's last clean end"))
	}
	s, err := openReadOnly(dir)
	if err != nil {
		if !Corrupt(err) {
			return r, err
		}
		r.damaged("store", err)
	}
	if err := checkTables(&r, s, dir); err != nil {
		return r, errors.Join(err, s.closeReadOnly())
	}
	if s == nil {
		return r, nil
	}
	if err := s.guard(func() error { s.checkRecords(&r, progress); return nil }); err != nil {
		r.damaged("store", err)
	}
	if err := s.closeReadOnly(); err != nil {
		r.damaged("store", err)
	}
	return r, nil
}

func exists(dir string) error {
	switch fi, err := os.Stat(dir); {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("no store at %s: name the folder that holds the MANIFEST, for an agent DATA/store", dir)
	case err != nil:
		return err
	case !fi.IsDir():
		return fmt.Errorf("%s is no folder", dir)
	}
	names, err := vfs.Default.List(dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		if strings.HasPrefix(n, "MANIFEST-") || strings.HasPrefix(n, "marker.") || strings.HasSuffix(n, ".sst") {
			return nil
		}
	}
	return fmt.Errorf("%s holds no store: name the folder that holds the MANIFEST, for an agent DATA/store", dir)
}

// checkTables checks the checksums of all tables that the store needs; of all
// in the folder, where it could not be opened.
func checkTables(r *Report, s *Store, dir string) error {
	files, err := tableFiles(dir)
	if err != nil {
		return err
	}
	live, err := s.liveTables()
	if err != nil {
		r.damaged("manifest", err)
	}
	for _, f := range files {
		if live != nil && !live[f] {
			continue // left over, the next start removes it
		}
		fi, err := os.Stat(filepath.Join(dir, f))
		if err != nil {
			return err
		}
		r.Tables++
		r.TableBytes += fi.Size()
		if err := checkTable(filepath.Join(dir, f)); err != nil {
			r.damaged(f, err)
		}
	}
	return nil
}

// tableFiles lists the tables in a folder, the newest first.
func tableFiles(dir string) ([]string, error) {
	names, err := vfs.Default.List(dir)
	if err != nil {
		return nil, err
	}
	names = slices.DeleteFunc(names, func(n string) bool { return !strings.HasSuffix(n, ".sst") })
	slices.SortFunc(names, func(a, b string) int {
		return cmpOr(len(b)-len(a), strings.Compare(b, a)) // numbers, padded to six digits
	})
	return names, nil
}

func cmpOr(a, b int) int {
	if a != 0 {
		return a
	}
	return b
}

// liveTables are the files that the open store needs; nil where there is none.
func (s *Store) liveTables() (map[string]bool, error) {
	if s == nil {
		return nil, nil
	}
	live := map[string]bool{}
	err := s.guard(func() error {
		levels, err := s.db.SSTables()
		for _, l := range levels {
			for _, t := range l {
				live[fmt.Sprintf("%06d.sst", uint64(t.BackingSSTNum))] = true
			}
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return live, nil
}

func openTable(path string) (*sstable.Reader, error) {
	f, err := vfs.Default.Open(path)
	if err != nil {
		return nil, err
	}
	readable, err := sstable.NewSimpleReadable(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	po := &pebble.Options{}
	po.EnsureDefaults()
	r, err := sstable.NewReader(context.Background(), readable, po.MakeReaderOptions())
	if err != nil {
		return nil, errors.Join(err, readable.Close())
	}
	return r, nil
}

func checkTable(path string) error {
	r, err := openTable(path)
	if err != nil {
		return err
	}
	return errors.Join(r.ValidateBlockChecksums(), r.Close())
}

// progressEvery is how many records lie between two calls of progress.
const progressEvery = 4096

func (s *Store) checkRecords(r *Report, progress func(int)) {
	it, err := s.db.NewIter(nil)
	if err != nil {
		r.damaged("store", err)
		return
	}
	n := 0
	for ok := it.First(); ok; ok = it.Next() {
		k := it.Key()
		v, err := decodeRecord(k, it.Value())
		if err != nil {
			r.damaged(fmt.Sprintf("%s %s", spaceName(k[0]), keyText(k[1:])), err)
		} else {
			r.Records[spaceName(k[0])]++
			if f, ok := v.(uint64); ok && string(k) == keyFormat {
				r.Format = f
			}
		}
		if n++; progress != nil && n%progressEvery == 0 {
			progress(n)
		}
	}
	if err := closeIter(it); err != nil {
		r.damaged("store", fmt.Errorf("after %d records: %w", n, err))
		return
	}
	if r.Format == 0 {
		r.damaged(keyFormat, fmt.Errorf("%w: no format record", errCorrupt))
	}
	if err := s.db.CheckLevels(nil); err != nil {
		r.damaged("levels", err)
	}
}

// openReadOnly opens a store without changing it. The lock is held meanwhile.
func openReadOnly(dir string) (*Store, error) {
	if err := exists(dir); err != nil {
		return nil, err
	}
	s := &Store{dir: dir, fs: vfs.Default, reserve: -1, log: slog.New(slog.DiscardHandler), failure: make(chan struct{})}
	err := s.guard(func() (err error) {
		s.db, err = pebble.Open(dir, readOnlyOptions(s))
		return err
	})
	if err != nil {
		if locked(dir, err) {
			return nil, fmt.Errorf("store %s: %w: its agent is running; take a backup of it and look at that, or stop the agent", dir, ErrInUse)
		}
		return nil, fmt.Errorf("store %s: %w", dir, err)
	}
	if err := s.guard(s.refuseNewer); err != nil {
		return nil, errors.Join(err, s.closeReadOnly())
	}
	return s, nil
}

func readOnlyOptions(s *Store) *pebble.Options {
	return &pebble.Options{
		FS:                          vfs.Default,
		ReadOnly:                    true,
		ErrorIfNotExists:            true,
		CacheSize:                   8 << 20,
		MemTableSize:                1 << 20,
		MaxOpenFiles:                64,
		DisableTableStats:           true,
		DisableAutomaticCompactions: true,
		FormatMajorVersion:          pebble.FormatNewest,
		Logger:                      &logger{s},
		EventListener:               &pebble.EventListener{DataCorruption: func(pebble.DataCorruptionInfo) {}},
	}
}

// refuseNewer is an error for a store that a newer Fairlead wrote. A format that
// cannot be read is for whoever reads the records.
func (s *Store) refuseNewer() error {
	v, closer, err := s.db.Get([]byte(keyFormat))
	if err != nil {
		return nil //nolint:nilerr // see above
	}
	defer func() { _ = closer.Close() }()
	if got, n := binary.Uvarint(v); n > 0 && got > format {
		return fmt.Errorf("store %s: %w: it has format %d, this program knows up to %d; use the newer version", s.dir, ErrNewer, got, format)
	}
	return nil
}

func (s *Store) closeReadOnly() error {
	if s == nil || s.failed.Load() != nil {
		return nil
	}
	return s.guard(s.db.Close)
}
