package store

import (
	"errors"
	"fmt"
	"reflect"
	"testing"
)

// record encodes an event as PutEvent stores it.
func record(t testing.TB, e *Event, before uint64) (k, v []byte) {
	t.Helper()
	s, _, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	b := s.NewBatch()
	if e.Gap == nil {
		b.PutEvent(e, before)
	} else {
		b.PutGap(e)
	}
	if err := b.Commit(true); err != nil {
		t.Fatal(err)
	}
	k = eventKey(e.Seq)
	v, closer, err := s.db.Get(k)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = closer.Close() }()
	return k, append([]byte(nil), v...)
}

var recorded = []Event{
	{Seq: 1, Epoch: 1, Topic: "fl/n/event/a"},
	{Seq: 1 << 40, Epoch: 1<<64 - 1, Time: 1790000000123, Topic: "fl/n/event/a/b", Payload: []byte{0, 1, 2}, QoS: 2, Expires: 1790000000124,
		Props: Props{ContentType: "text/plain", User: [][2]string{{"unit", "bar"}, {"unit", ""}}}},
	{Seq: 20, Epoch: 7, Time: 1790000000123, Gap: &EventGap{From: 11, Before: 100}, Before: 1000, Sum: 1000},
}

func TestEventRecord(t *testing.T) {
	for _, e := range recorded {
		k, v := record(t, &e, 100)
		if e.Gap == nil && e.Sum-e.Before != uint64(len(k)+len(v)) {
			t.Errorf("a record of %d bytes counts as %d", len(k)+len(v), e.Sum-e.Before)
		}
		got, err := decodeEvent(k, v)
		if err != nil {
			t.Error(err)
		}
		if len(got.Payload) == 0 {
			got.Payload = nil
		}
		if !reflect.DeepEqual(got, e) {
			t.Errorf("got\n%+v, want\n%+v", got, e)
		}
		// What is cut off or of another format is damage, and never a panic.
		for n := range v {
			if _, err := decodeEvent(k, v[:n]); err == nil && n < len(v)-len(e.Payload) {
				t.Errorf("%d of %d bytes are taken for a record", n, len(v))
			} else if err != nil && !errors.Is(err, errCorrupt) {
				t.Error(err)
			}
		}
		v[0]++
		if _, err := decodeEvent(k, v); !errors.Is(err, errCorrupt) {
			t.Errorf("another format: %v", err)
		}
	}
	if n, bytes := recorded[2].Dropped(); n != 10 || bytes != 900 {
		t.Errorf("the gap has %d events of %d bytes", n, bytes)
	}
}

func FuzzEventRecord(f *testing.F) {
	for i := range recorded {
		k, v := record(f, &recorded[i], 100)
		f.Add(k, v)
	}
	f.Fuzz(func(t *testing.T, k, v []byte) {
		e, err := decodeEvent(k, v)
		if err != nil {
			if !errors.Is(err, errCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if e.Seq == 0 && e.Gap != nil {
			t.Fatalf("a gap up to 0: %+v", e)
		}
		if n, bytes := e.Dropped(); e.Gap != nil && (n == 0 || n > e.Seq || bytes > e.Sum) {
			t.Fatalf("a gap of %d events and %d bytes: %+v", n, bytes, e)
		}
	})
}

func TestEventMarks(t *testing.T) {
	s, _, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	list := func() (out []string) {
		t.Helper()
		err := s.EachMark(func(node, epoch string, m Mark) error {
			out = append(out, fmt.Sprintf("%s/%s:%d,%d", node, epoch, m.Seq, m.Used))
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	b := s.NewBatch()
	b.PutMark("plant-7", "b", Mark{Seq: 1 << 50, Used: 2})
	b.PutMark("plant-7", "a", Mark{Seq: 1, Used: 3})
	b.PutMark("plant-70", "a", Mark{Seq: 7, Used: 1})
	b.PutMark("plant-7", "c", Mark{Seq: 9, Used: 9})
	b.DeleteMark("plant-7", "c")
	if err := b.Commit(true); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(list()); got != "[plant-7/a:1,3 plant-7/b:1125899906842624,2 plant-70/a:7,1]" {
		t.Errorf("got %s", got)
	}
	for _, bad := range []string{"no epoch", "plant-7\x00a"} {
		if _, _, _, err := decodeMark(bad, []byte{0x80}); !errors.Is(err, errCorrupt) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// Reading events, and deleting them one by one and as a range.
func TestEventsRange(t *testing.T) {
	dir := t.TempDir()
	s, _, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	b, sum := s.NewBatch(), uint64(0)
	for seq := uint64(1); seq <= 100; seq++ {
		e := Event{Seq: seq, Topic: "fl/n/event/a"}
		b.PutEvent(&e, sum)
		sum = e.Sum
	}
	if err := b.Commit(true); err != nil {
		t.Fatal(err)
	}
	seqs := func(from, to uint64, n int) string {
		t.Helper()
		found, err := s.Events(from, to, n)
		if err != nil {
			t.Fatal(err)
		}
		if len(found) == 0 {
			return "none"
		}
		return fmt.Sprintf("%d-%d (%d)", found[0].Seq, found[len(found)-1].Seq, len(found))
	}
	for _, x := range []struct {
		from, to uint64
		n        int
		want     string
	}{
		{0, 1<<64 - 1, 1000, "1-100 (100)"}, {1, 100, 10, "1-10 (10)"}, {99, 1000, 10, "99-100 (2)"},
		{50, 50, 10, "50-50 (1)"}, {101, 1000, 10, "none"}, {10, 9, 10, "none"},
	} {
		if got := seqs(x.from, x.to, x.n); got != x.want {
			t.Errorf("%d to %d, %d: got %s, want %s", x.from, x.to, x.n, got, x.want)
		}
	}
	b = s.NewBatch()
	b.DeleteEvents(1, 3)
	b.DeleteEvents(4, 60)
	if err := b.Commit(true); err != nil {
		t.Fatal(err)
	}
	if got := seqs(0, 1000, 1000); got != "61-100 (40)" {
		t.Errorf("left is %s", got)
	}
	last, ok, err := s.LastEvent()
	if err != nil || !ok || last.Seq != 100 || last.Sum != sum {
		t.Errorf("the last is %+v, %v, %v", last, ok, err)
	}
	if err := View(dir, func(*Store) error { return nil }); !errors.Is(err, ErrInUse) {
		t.Errorf("beside an open one: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Events(0, 1000, 1); err == nil {
		t.Error("a closed store gives events")
	}
	n := 0
	if err := View(dir, func(s *Store) error {
		found, err := s.Events(0, 1000, 1000)
		n = len(found)
		return err
	}); err != nil || n != 40 {
		t.Errorf("viewed %d, %v", n, err)
	}
}
