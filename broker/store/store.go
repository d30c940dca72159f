// Package store keeps a broker's retained messages, sessions and Wills in Pebble.
//
//	s, aside, err := store.Open(dir, store.Options{Logger: log})
//	b := s.NewBatch()
//	b.PutRetained(store.Retained{Topic: "fl/plant-7/reported/node", Payload: p})
//	err = b.Commit(true) // nil means: on the disk
//
// It is the edge's only database: what the node needs to restart without the
// cloud is here, under the topics that everybody can read.
package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// format is the version of the keys and values below. A store with a larger
// one was written by a newer Fairlead and is refused.
const format = 2

// Key spaces: one byte, then the name.
const (
	keyFormat   = "f"
	keyRetained = 'r' // + topic
	keyWill     = 'w' // + client id
)

// DefaultReserve is the free space below which nothing more is written.
const DefaultReserve = 16 << 20

// Options are a store's settings; the zero value is right for an edge node.
type Options struct {
	// CacheBytes is the block cache; 2 MiB where it is 0.
	CacheBytes int64
	// MemTableBytes is one write buffer; 1 MiB where it is 0.
	MemTableBytes uint64
	// ReserveBytes is the free disk space below which writes are refused with
	// [ErrDiskFull], so that the store itself never meets a full disk.
	// [DefaultReserve] where it is 0, no check where it is negative.
	ReserveBytes int64
	// FS replaces the operating system's file system in tests.
	FS     vfs.FS
	Logger *slog.Logger
}

// ErrDiskFull is returned by commits while the disk has less than the reserve free.
var ErrDiskFull = errors.New("disk full")

// ErrFailed is returned by commits after the store met an error. Where a
// restart is needed it says so; that opens it again with all that was committed.
var ErrFailed = errors.New("store failed")

// ErrInUse is wrapped by [Open] where another process has the store.
var ErrInUse = errors.New("store in use")

// ErrNewer is wrapped by [Open] where a newer Fairlead wrote the store.
var ErrNewer = errors.New("store written by a newer Fairlead")

// Retained is a retained message.
type Retained struct {
	Topic   string
	Payload []byte
	QoS     byte
	// Expires is when the message dies, in milliseconds since 1970; 0 is never.
	Expires int64
	// Props are the MQTT 5 properties that travel with it.
	Props Props
}

// Props are the publish properties that a broker passes on unchanged.
type Props struct {
	ContentType     string      `json:"contentType,omitempty"`
	ResponseTopic   string      `json:"responseTopic,omitempty"`
	CorrelationData []byte      `json:"correlationData,omitempty"`
	PayloadFormat   *byte       `json:"payloadFormat,omitempty"`
	User            [][2]string `json:"user,omitempty"`
}

// Zero tells whether no property is set.
func (p *Props) Zero() bool {
	return p.ContentType == "" && p.ResponseTopic == "" && len(p.CorrelationData) == 0 &&
		p.PayloadFormat == nil && len(p.User) == 0
}

// Will is a client's last will, kept so that a broker that was killed publishes
// it when it is back [MQTT-3.1.2-8].
type Will struct {
	ClientID string `json:"-"`
	Topic    string `json:"topic"`
	Payload  []byte `json:"payload"`
	QoS      byte   `json:"qos"`
	Retain   bool   `json:"retain"`
	// Expiry is the interval in seconds after which the published Will dies; 0 is never.
	Expiry uint32 `json:"expiry,omitempty"`
	// Delay is how many seconds the Will waits for its client to come back.
	Delay uint32 `json:"delay,omitempty"`
	Props Props  `json:"props,omitzero"`
}

// Store is an open store. Its methods may be called from any goroutine.
type Store struct {
	db      *pebble.DB
	fs      vfs.FS
	dir     string
	reserve int64
	log     *slog.Logger
	failed  atomic.Pointer[error]
	failure chan struct{} // closed when failed is set
	checked atomic.Int64  // UnixNano of the last look at the free space
	written atomic.Int64  // bytes since then
	full    atomic.Bool
	stats   atomic.Pointer[Stats] // as last read
	trouble atomic.Pointer[error] // of the last flush or compaction, which is tried again
	usage   atomic.Uint64         // as last read
	closed  atomic.Bool
	opts    Options

	tables        sstable.WriterOptions // of a checkpoint
	checkpointing sync.Mutex
	unsynced      atomic.Bool   // something was committed without sync since the last sync
	put           atomic.Uint64 // bytes that were asked to be stored
	backing       sync.Mutex    // held by the one backup at a time
	life          sync.RWMutex  // Close takes it, so that nobody else looks at a closed Pebble
}

// Open opens or creates the store in dir. One that Pebble finds corrupt is not
// deleted: it is renamed, aside names where it went, and an empty one is opened
// in its place. A store that is locked, unreadable or too new is an error.
func Open(dir string, o Options) (s *Store, aside string, err error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s, err = open(dir, o)
	if err == nil || !Corrupt(err) || o.FS != nil {
		return s, "", err
	}
	if aside, err = SetAside(dir, err, o.Logger); err != nil {
		return nil, "", err
	}
	s, err = open(dir, o)
	return s, aside, err
}

// SetAside renames a corrupt store that is not open, and gives its new name.
// cause is why.
func SetAside(dir string, cause error, log *slog.Logger) (aside string, err error) {
	aside = fmt.Sprintf("%s.broken-%s", dir, time.Now().UTC().Format("20060102T150405.000000"))
	if rerr := os.Rename(dir, aside); rerr != nil {
		return "", fmt.Errorf("%w; setting it aside failed too: %w; move %s away yourself", cause, rerr, dir)
	}
	log.Error("store is corrupt, set aside and begun anew", "dir", dir, "aside", aside, "error", cause)
	return aside, nil
}

// errCorrupt marks damage that this package found itself.
var errCorrupt = errors.New("corrupt store")

// Corrupt tells damage, which is worth setting the store aside for, from
// trouble that goes away by itself or by the operator's hand.
func Corrupt(err error) bool {
	if errors.Is(err, ErrInUse) || errors.Is(err, ErrNewer) {
		return false
	}
	if errors.Is(err, errCorrupt) || pebble.IsCorruptionError(err) || errors.Is(err, os.ErrNotExist) {
		return true
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return false // the system's trouble: permissions, a full disk, too many files
	}
	// Pebble does not mark every damage; these are its words for a manifest,
	// options file or log that cannot be read.
	for _, w := range []string{"corrupt", "checksum", "invalid", "EOF", "malformed", "MANIFEST", "no such file"} {
		if strings.Contains(err.Error(), w) {
			return true
		}
	}
	return false
}

func open(dir string, o Options) (*Store, error) {
	s := &Store{dir: dir, reserve: o.ReserveBytes, log: o.Logger, opts: o, failure: make(chan struct{})}
	if s.reserve == 0 {
		s.reserve = DefaultReserve
	}
	fs := o.FS
	if fs == nil {
		fs = vfs.Default
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("store %s: %w", dir, err)
		}
		if err := writable(dir); err != nil {
			return nil, fmt.Errorf("store %s: %w", dir, err)
		}
	}
	s.fs = fs
	if err := fs.RemoveAll(dir + backupSuffix); err != nil { // of a backup that a kill ended
		return nil, fmt.Errorf("store %s: %w", dir, err)
	}
	if err := s.checkClean(); err != nil {
		return nil, err
	}
	cache := o.CacheBytes
	if cache == 0 {
		cache = 2 << 20
	}
	mem := o.MemTableBytes
	if mem == 0 {
		mem = 1 << 20
	}
	c := pebble.NewCache(cache)
	defer c.Unref()
	po := &pebble.Options{
		FS:                          fs,
		Cache:                       c,
		MemTableSize:                mem,
		MemTableStopWritesThreshold: 4,
		MaxOpenFiles:                64,
		DisableTableStats:           true,
		FormatMajorVersion:          pebble.FormatNewest,
		MaxManifestFileSize:         1 << 20, // 128 MiB would be most of a small store
		Logger:                      &logger{s},
		EventListener: &pebble.EventListener{
			BackgroundError: func(err error) { s.trouble.Store(&err) },
			// Pebble's own ends the process. Whoever reads gets the error as well.
			DataCorruption: func(i pebble.DataCorruptionInfo) {
				s.log.Error("store is damaged", "dir", dir, "file", i.Path, "error", i.Details)
			},
			FlushEnd: func(i pebble.FlushInfo) {
				if i.Err == nil {
					s.trouble.Store(nil)
				}
			},
		},
	}
	po.EnsureDefaults()
	var db *pebble.DB
	err := s.guard(func() (err error) {
		db, err = pebble.Open(dir, po)
		return err
	})
	if err != nil {
		if locked(dir, err) {
			return nil, fmt.Errorf("store %s: %w: another process has it open; stop that one or choose another data folder", dir, ErrInUse)
		}
		return nil, fmt.Errorf("store %s: %w", dir, err)
	}
	s.db, s.tables = db, po.MakeWriterOptions(0, db.TableFormat())
	if err := s.guard(s.checkFormat); err != nil {
		return nil, errors.Join(err, s.guard(db.Close))
	}
	return s, nil
}

// locked tells whether opening the store failed because somebody has it open.
func locked(dir string, err error) bool {
	return errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EACCES) && fileExists(filepath.Join(dir, "LOCK")) ||
		strings.Contains(err.Error(), "lock held by current process")
}

// cleanFile is left when the store was closed, and sums up its files. Pebble
// takes the damaged end of a manifest or log for what a power cut tore off, and
// goes on without it; after a clean end, that shows here.
const cleanFile = "CLEAN"

// checkClean compares the store with its mark of a clean end, if there is one,
// and takes the mark away: gone for good before Pebble changes anything.
func (s *Store) checkClean() error {
	marked, err := s.compareClean()
	if err != nil || !marked {
		return err
	}
	if err := errors.Join(s.fs.Remove(filepath.Join(s.dir, cleanFile)), s.syncDir()); err != nil {
		return fmt.Errorf("store %s: %w", s.dir, err)
	}
	return nil
}

// compareClean compares the store with its mark of a clean end and tells
// whether there is one.
func (s *Store) compareClean() (marked bool, err error) {
	f, err := s.fs.Open(filepath.Join(s.dir, cleanFile))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("store %s: %w", s.dir, err)
	}
	mark, err := io.ReadAll(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return false, fmt.Errorf("store %s: %w", s.dir, err)
	}
	sum, err := s.sum()
	if err != nil {
		return false, fmt.Errorf("store %s: %w", s.dir, err)
	}
	if !bytes.Equal(mark, sum) {
		return false, fmt.Errorf("store %s: %w: its files are not those of its last clean end", s.dir, errCorrupt)
	}
	return true, nil
}

// markClean leaves the mark of a clean end in a closed store.
func (s *Store) markClean() error {
	sum, err := s.sum()
	if err != nil {
		return err
	}
	f, err := s.fs.Create(filepath.Join(s.dir, cleanFile), vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	_, err = f.Write(sum)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return s.syncDir()
}

func (s *Store) syncDir() error {
	d, err := s.fs.OpenDir(s.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// sum covers the names and sizes of the tables, and the content of the manifest
// and the logs, which is small; the tables have checksums of their own.
func (s *Store) sum() ([]byte, error) {
	names, err := s.fs.List(s.dir)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	h := sha256.New()
	for _, name := range names {
		table, whole := strings.HasSuffix(name, ".sst"), strings.HasSuffix(name, ".log") || strings.HasPrefix(name, "MANIFEST-")
		if !table && !whole {
			continue
		}
		path := filepath.Join(s.dir, name)
		fi, err := s.fs.Stat(path)
		if err != nil {
			return nil, err
		}
		_, _ = fmt.Fprintf(h, "%s %d\n", name, fi.Size()) // a hash takes everything
		if !whole {
			continue
		}
		f, err := s.fs.Open(path)
		if err != nil {
			return nil, err
		}
		_, err = io.Copy(h, f)
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
	}
	return hex.AppendEncode(nil, h.Sum(nil)), nil
}

func fileExists(p string) bool { _, err := os.Stat(p); return err == nil }

func writable(dir string) error {
	f, err := os.CreateTemp(dir, ".probe-*")
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

func (s *Store) checkFormat() error {
	v, closer, err := s.db.Get([]byte(keyFormat))
	if errors.Is(err, pebble.ErrNotFound) {
		b := binary.AppendUvarint(nil, format)
		if err := s.db.Set([]byte(keyFormat), b, pebble.Sync); err != nil {
			return fmt.Errorf("store %s: write format: %w", s.dir, err)
		}
		// A new store's first log is still of the old kind, in which damage
		// cannot be told from a torn end. This begins the next.
		if err := s.db.Flush(); err != nil {
			return fmt.Errorf("store %s: %w", s.dir, err)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("store %s: read format: %w", s.dir, err)
	}
	defer func() { _ = closer.Close() }()
	got, n := binary.Uvarint(v)
	if n <= 0 {
		return fmt.Errorf("store %s: %w: format record %x", s.dir, errCorrupt, v)
	}
	if got > format {
		return fmt.Errorf("store %s: %w: it has format %d, this program knows up to %d; install the newer version again", s.dir, ErrNewer, got, format)
	}
	if got < format { // format 1 had no sessions; all its records are as they are now
		if err := s.db.Set([]byte(keyFormat), binary.AppendUvarint(nil, format), pebble.Sync); err != nil {
			return fmt.Errorf("store %s: write format: %w", s.dir, err)
		}
	}
	return nil
}

// Close closes the store, once. Nothing that was committed with sync is lost
// without it.
func (s *Store) Close() error {
	s.closed.Store(true)
	if e := s.failed.Load(); e != nil {
		return nil // Pebble's locks are as the failure left them; the next start recovers
	}
	s.life.Lock()
	defer s.life.Unlock()
	if err := s.guard(s.db.Close); err != nil {
		return fmt.Errorf("store %s: close: %w", s.dir, err)
	}
	if err := s.markClean(); err != nil {
		// The store is closed and whole; only the check at its next start is missing.
		s.log.Warn("no mark of a clean end", "dir", s.dir, "error", err)
	}
	return nil
}

// Err tells why commits are refused at the moment: [ErrDiskFull], [ErrFailed] or nil.
func (s *Store) Err() error {
	if e := s.failed.Load(); e != nil {
		return *e
	}
	if e := s.trouble.Load(); e != nil {
		// What was acknowledged is in the log; more of it would end in a stall.
		kind := ErrFailed
		if errors.Is(*e, syscall.ENOSPC) {
			kind = ErrDiskFull
		}
		return fmt.Errorf("%w: %w; check the disk of %s, it is tried again", kind, *e, s.dir)
	}
	if s.reserve < 0 || s.opts.FS != nil {
		return nil
	}
	// The free space moves slowly against the reserve; once a second is enough.
	// A burst is not allowed to outrun that.
	now := time.Now().UnixNano()
	burst := s.written.Load() > s.reserve/8
	if last := s.checked.Load(); (burst || now-last > int64(time.Second)) && s.checked.CompareAndSwap(last, now) {
		s.written.Store(0)
		var st syscall.Statfs_t
		if err := syscall.Statfs(s.dir, &st); err == nil {
			free := int64(st.Bavail) * int64(st.Bsize) //nolint:unconvert // Bsize is an int32 on 32-bit ARM
			full := free < s.reserve
			if full != s.full.Swap(full) {
				if full {
					s.log.Error("disk nearly full, nothing more is stored or acknowledged; make room", "dir", s.dir, "free", free, "reserve", s.reserve)
				} else {
					s.log.Info("disk has room again", "dir", s.dir, "free", free)
				}
			}
		}
	}
	if s.full.Load() {
		return fmt.Errorf("%w: less than %d MiB free on the disk of %s; make room, nothing acknowledged is lost", ErrDiskFull, s.reserve>>20, s.dir)
	}
	return nil
}

// DiskUsage is the size of the store in bytes; of a store that failed or is
// closed, what it was before.
func (s *Store) DiskUsage() uint64 {
	s.life.RLock()
	defer s.life.RUnlock()
	if s.failed.Load() == nil && !s.closed.Load() {
		s.usage.Store(s.db.Metrics().DiskSpaceUsage())
	}
	return s.usage.Load()
}

// EachRetained calls fn for every retained message, sorted by topic. The
// message is fn's to keep. It stops at fn's first error.
func (s *Store) EachRetained(fn func(Retained) error) error {
	return s.each(keyRetained, func(name string, v []byte) error {
		r, err := decodeRetained(name, v)
		if err != nil {
			return err
		}
		return fn(r)
	})
}

// Wills lists the stored Wills.
func (s *Store) Wills() ([]Will, error) {
	var out []Will
	err := s.each(keyWill, func(name string, v []byte) error {
		w := Will{ClientID: name}
		if err := json.Unmarshal(v, &w); err != nil {
			return fmt.Errorf("%w: will of %q: %w", errCorrupt, name, err)
		}
		out = append(out, w)
		return nil
	})
	return out, err
}

func (s *Store) each(space byte, fn func(name string, v []byte) error) error {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{space}, UpperBound: []byte{space + 1}})
	if err != nil {
		return fmt.Errorf("store %s: %w", s.dir, err)
	}
	for ok := it.First(); ok; ok = it.Next() {
		if err := fn(string(it.Key()[1:]), it.Value()); err != nil {
			return errors.Join(fmt.Errorf("store %s: %w", s.dir, err), it.Close())
		}
	}
	if err := errors.Join(it.Error(), it.Close()); err != nil {
		return fmt.Errorf("store %s: %w", s.dir, err)
	}
	return nil
}

// Batch collects changes that become durable together. It is one goroutine's.
type Batch struct {
	s *Store
	b *pebble.Batch
}

// NewBatch begins a batch.
func (s *Store) NewBatch() *Batch { return &Batch{s: s, b: s.db.NewBatch()} }

// Empty tells whether nothing was put in.
func (b *Batch) Empty() bool { return b.b.Empty() }

// PutRetained stores a message; an empty payload removes the topic.
func (b *Batch) PutRetained(r Retained) {
	if len(r.Payload) == 0 {
		_ = b.b.Delete(key(keyRetained, r.Topic), nil)
		return
	}
	_ = b.b.Set(key(keyRetained, r.Topic), encodeRetained(r), nil)
}

// PutWill stores a client's Will.
func (b *Batch) PutWill(w Will) error {
	v, err := json.Marshal(w)
	if err != nil {
		return fmt.Errorf("will of %q: %w", w.ClientID, err)
	}
	return b.b.Set(key(keyWill, w.ClientID), v, nil)
}

// DeleteWill removes a client's Will.
func (b *Batch) DeleteWill(clientID string) { _ = b.b.Delete(key(keyWill, clientID), nil) }

// Commit applies the batch; with sync it returns nil only once the disk has it.
// The batch is used up whatever the result.
func (b *Batch) Commit(sync bool) error {
	if b.b.Empty() {
		return b.b.Close()
	}
	if err := b.s.Err(); err != nil {
		_ = b.b.Close()
		return err
	}
	b.s.written.Add(int64(b.b.Len()))
	b.s.put.Add(uint64(b.b.Len()))
	o := pebble.NoSync
	if sync {
		o = pebble.Sync
	}
	err := b.s.guard(func() error { return errors.Join(b.b.Commit(o), b.b.Close()) })
	if !sync {
		b.s.unsynced.Store(true)
	}
	if err != nil && !errors.Is(err, ErrFailed) {
		return fmt.Errorf("store %s: commit: %w", b.s.dir, err)
	}
	return err
}

// guard runs fn on a goroutine of its own: a store that fails ends the goroutine
// that it fails on, see logger.Fatalf, and what waits for that one may wait for
// ever.
func (s *Store) guard(fn func() error) error {
	done := make(chan error, 1)
	go func() { done <- fn() }()
	select {
	case err := <-done:
		return err
	case <-s.failure:
		select {
		case err := <-done: // it ended before
			return err
		default:
			return *s.failed.Load()
		}
	}
}

func key(space byte, name string) []byte {
	k := make([]byte, 0, 1+len(name))
	return append(append(k, space), name...)
}

// A retained value is: format byte 1, QoS, uvarint expiry, uvarint length of
// the properties' JSON (0 for none), that JSON, payload.
func encodeRetained(r Retained) []byte {
	var props []byte
	if !r.Props.Zero() {
		props, _ = json.Marshal(r.Props)
	}
	v := make([]byte, 0, 2+2*binary.MaxVarintLen64+len(props)+len(r.Payload))
	v = append(v, 1, r.QoS)
	v = binary.AppendUvarint(v, uint64(r.Expires))
	v = binary.AppendUvarint(v, uint64(len(props)))
	v = append(v, props...)
	return append(v, r.Payload...)
}

func decodeRetained(topic string, v []byte) (Retained, error) {
	bad := fmt.Errorf("%w: record of topic %q", errCorrupt, topic)
	r := Retained{Topic: topic}
	if len(v) < 4 || v[0] != 1 {
		return r, bad
	}
	r.QoS = v[1]
	v = v[2:]
	exp, n := binary.Uvarint(v)
	if n <= 0 {
		return r, bad
	}
	r.Expires = int64(exp)
	v = v[n:]
	plen, n := binary.Uvarint(v)
	if n <= 0 || plen > uint64(len(v)-n) {
		return r, bad
	}
	v = v[n:]
	if plen > 0 {
		if err := json.Unmarshal(v[:plen], &r.Props); err != nil {
			return r, fmt.Errorf("%w: %w", bad, err)
		}
	}
	r.Payload = append([]byte(nil), v[plen:]...)
	return r, nil
}

// logger carries Pebble's words into slog. Fatalf marks the store as failed.
type logger struct{ s *Store }

func (l *logger) Infof(format string, args ...any) {
	if !l.s.log.Enabled(context.Background(), slog.LevelDebug) {
		return // Pebble tells of every flush
	}
	l.s.log.Debug("pebble", "message", fmt.Sprintf(format, args...))
}

func (l *logger) Errorf(format string, args ...any) {
	l.s.log.Warn("pebble", "message", fmt.Sprintf(format, args...))
}

// Fatalf must not return, and Pebble expects the process to end. It is called
// on the goroutine of a commit or on one of Pebble's own; only that one ends.
// Every commit from then on is refused, and the process lives to say why.
func (l *logger) Fatalf(format string, args ...any) {
	err := fmt.Errorf("%w: %s; check the disk and restart to open it again, nothing acknowledged is lost", ErrFailed, fmt.Sprintf(format, args...))
	if l.s.failed.CompareAndSwap(nil, &err) {
		l.s.log.Error("store failed, nothing more is acknowledged", "dir", l.s.dir, "error", err)
		close(l.s.failure)
	}
	runtime.Goexit()
}
