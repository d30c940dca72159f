package store

import (
	"github.com/cockroachdb/pebble/v2"
	"github.com/prometheus/client_golang/prometheus"
)

// Stats are what the store costs the disk. Counters begin at 0 with the process.
type Stats struct {
	// SizeBytes is the size on disk: tables, logs, manifest, what is about to be removed.
	SizeBytes uint64 `json:"sizeBytes"`
	// PutBytes are keys and values as they were handed to the store.
	PutBytes uint64 `json:"putBytes"`
	// Written is what became of them on the disk, in bytes.
	Written Written `json:"writtenBytes"`
	// WriteAmplification is written over put; 0 before the first put. It is
	// below 1 where compression saves more than compaction costs.
	WriteAmplification float64 `json:"writeAmplification"`
}

// Written are bytes written to the disk, by why. The manifest is not in it: a
// few hundred bytes per flush, compaction and checkpoint.
type Written struct {
	WAL        uint64 `json:"wal"`
	Flush      uint64 `json:"flush"`
	Compaction uint64 `json:"compaction"`
	Checkpoint uint64 `json:"checkpoint"`
}

// Total is the sum of all kinds.
func (w Written) Total() uint64 { return w.WAL + w.Flush + w.Compaction + w.Checkpoint }

// Stats tells what the store costs the disk; for a store that failed or is
// closed, what it was before. It is cheap.
func (s *Store) Stats() Stats {
	s.life.RLock()
	defer s.life.RUnlock()
	if s.failed.Load() == nil && !s.closed.Load() {
		st := statsOf(s.db.Metrics(), s.put.Load())
		s.stats.Store(&st)
		s.usage.Store(st.SizeBytes)
	}
	if st := s.stats.Load(); st != nil {
		return *st
	}
	return Stats{}
}

func statsOf(m *pebble.Metrics, put uint64) Stats {
	st := Stats{SizeBytes: m.DiskSpaceUsage(), PutBytes: put, Written: Written{WAL: m.WAL.BytesWritten}}
	for _, l := range m.Levels {
		st.Written.Flush += l.TableBytesFlushed
		st.Written.Compaction += l.TableBytesCompacted
		st.Written.Checkpoint += l.TableBytesIngested
	}
	if put > 0 {
		st.WriteAmplification = float64(st.Written.Total()) / float64(put)
	}
	return st
}

// Counts counts the records of every key space that has some, by its name. It
// reads all keys: for a person who asks, not for a scrape.
func (s *Store) Counts() (map[string]int, error) {
	s.life.RLock()
	defer s.life.RUnlock()
	if err := s.alive(); err != nil {
		return nil, err
	}
	counts := map[string]int{}
	err := s.guard(func() error {
		it, err := s.db.NewIter(nil)
		if err != nil {
			return err
		}
		n := map[byte]int{}
		for ok := it.First(); ok; ok = it.Next() {
			n[it.Key()[0]]++
		}
		for b, c := range n {
			counts[spaceName(b)] = c
		}
		return closeIter(it)
	})
	if err != nil {
		return nil, err
	}
	return counts, nil
}

// alive tells why there is no Pebble to ask, or nil. The caller holds life.
func (s *Store) alive() error {
	if e := s.failed.Load(); e != nil {
		return *e
	}
	if s.closed.Load() {
		return errClosed
	}
	return nil
}

// Collect implements [prometheus.Collector].
func (s *Store) Collect(ch chan<- prometheus.Metric) {
	st := s.Stats()
	ch <- prometheus.MustNewConstMetric(descSize, prometheus.GaugeValue, float64(st.SizeBytes))
	ch <- prometheus.MustNewConstMetric(descPut, prometheus.CounterValue, float64(st.PutBytes))
	ch <- prometheus.MustNewConstMetric(descAmplification, prometheus.GaugeValue, st.WriteAmplification)
	for kind, n := range map[string]uint64{
		"wal": st.Written.WAL, "flush": st.Written.Flush, "compaction": st.Written.Compaction, "checkpoint": st.Written.Checkpoint,
	} {
		ch <- prometheus.MustNewConstMetric(descWritten, prometheus.CounterValue, float64(n), kind)
	}
}

// Describe implements [prometheus.Collector].
func (s *Store) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descSize, descPut, descWritten, descAmplification} {
		ch <- d
	}
}

var (
	descSize = prometheus.NewDesc("fairlead_store_size_bytes", "Size of the store on disk.", nil, nil)
	descPut  = prometheus.NewDesc("fairlead_store_put_bytes_total", "Keys and values handed to the store.", nil, nil)

	descWritten = prometheus.NewDesc("fairlead_store_written_bytes_total", "Bytes that the store wrote to the disk, by why.", []string{"kind"}, nil)

	descAmplification = prometheus.NewDesc("fairlead_store_write_amplification", "Bytes written to the disk for every byte handed to the store, since the start.", nil, nil)
)
