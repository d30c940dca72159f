package digest_test

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math/big"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/quick"

	"github.com/fairlead-io/fairlead/schemas/digest"
)

// TestOf pins the hash: another one would make every node repair everything.
func TestOf(t *testing.T) {
	sum := sha256.Sum256([]byte("fl/n/reported/node\x00{}"))
	h := digest.Of("fl/n/reported/node", []byte("{}"))
	if h != digest.Hash(sum[:16]) {
		t.Errorf("Of = %s, want the first 16 bytes of %x", h, sum)
	}
	if want := "2569ad6cb3d3a54041d4bbe5be63c5e2"; h.String() != want {
		t.Errorf("Of = %s, want %s", h, want)
	}
	if digest.Of("a", []byte("b/c")) == digest.Of("a/b", []byte("c")) {
		t.Error("the topic is not kept apart from the payload")
	}
}

func TestHashText(t *testing.T) {
	h := digest.Of("a", []byte("b"))
	b, err := json.Marshal(map[string]digest.Hash{"a": h})
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"a":"` + h.String() + `"}`; string(b) != want {
		t.Errorf("JSON is %s, want %s", b, want)
	}
	var back map[string]digest.Hash
	if err := json.Unmarshal(b, &back); err != nil || back["a"] != h {
		t.Errorf("read back %v, %v", back, err)
	}
	for _, s := range []string{"", "00", strings.Repeat("0", 31), strings.Repeat("0", 33), strings.Repeat("g", 32)} {
		var h digest.Hash
		if err := h.UnmarshalText([]byte(s)); err == nil || !strings.Contains(err.Error(), "hash") {
			t.Errorf("UnmarshalText(%q): %v", s, err)
		}
	}
}

// recompute is the digest by its definition: the sum of the hashes modulo 2^128.
func recompute(s *digest.Set) string {
	sum := new(big.Int)
	for _, t := range s.Topics("", 0) {
		h, _ := s.Get(t)
		sum.Add(sum, new(big.Int).SetBytes(h[:]))
	}
	sum.Mod(sum, new(big.Int).Lsh(big.NewInt(1), 128))
	return fmt.Sprintf("%032x", sum)
}

func TestEmpty(t *testing.T) {
	s := digest.NewSet()
	if s.Sum() != (digest.Hash{}) || s.Count() != 0 || len(s.Topics("", 0)) != 0 {
		t.Errorf("empty set: %s, %d", s.Sum(), s.Count())
	}
	if s.Remove("a") {
		t.Error("Remove took out what was not there")
	}
	if s.Put("a", nil) {
		t.Error("an empty payload was put")
	}
}

func TestPutRemove(t *testing.T) {
	s := digest.NewSet()
	if !s.Put("a", []byte("1")) || s.Put("a", []byte("1")) {
		t.Error("Put does not tell a change")
	}
	one := s.Sum()
	if !s.Put("a", []byte("2")) || s.Sum() == one {
		t.Error("a new payload left the digest alone")
	}
	if !s.Put("b", []byte("1")) || s.Count() != 2 {
		t.Error("b was not put")
	}
	if !s.Put("b", []byte{}) || s.Count() != 1 {
		t.Error("an empty payload does not remove")
	}
	if !s.Put("a", []byte("1")) || s.Sum() != one {
		t.Error("the way back does not give the digest back")
	}
	if !s.Remove("a") || s.Sum() != (digest.Hash{}) {
		t.Errorf("after all is removed: %s", s.Sum())
	}
}

func TestOrderFree(t *testing.T) {
	topics := make([]string, 100)
	for i := range topics {
		topics[i] = fmt.Sprintf("fl/n/desired/pod/default/web-%d", i)
	}
	var want digest.Hash
	for round := range 20 {
		r := rand.New(rand.NewPCG(uint64(round), 1))
		r.Shuffle(len(topics), func(i, j int) { topics[i], topics[j] = topics[j], topics[i] })
		s := digest.NewSet()
		for _, topic := range topics {
			s.Put(topic, []byte(topic))
		}
		if round == 0 {
			want = s.Sum()
		}
		if s.Sum() != want {
			t.Fatalf("round %d: %s, want %s", round, s.Sum(), want)
		}
	}
}

// TestAgainstRecomputation runs random histories and compares the running
// digest with the definition after every step.
func TestAgainstRecomputation(t *testing.T) {
	type step struct {
		Topic   uint8
		Payload uint8
		Remove  bool
	}
	check := func(steps []step) bool {
		s := digest.NewSet()
		for _, st := range steps {
			topic := fmt.Sprint("t", st.Topic%8)
			if st.Remove {
				s.Remove(topic)
			} else {
				s.Put(topic, []byte{st.Payload})
			}
			if s.Sum().String() != recompute(s) {
				return false
			}
		}
		return true
	}
	if err := quick.Check(check, nil); err != nil {
		t.Error(err)
	}
	// Carries over both words and the end.
	s := digest.NewSet()
	all := digest.Hash(slices.Repeat([]byte{0xff}, 16))
	for i := range 5 {
		s.PutHash(fmt.Sprint(i), all)
	}
	if s.Sum().String() != recompute(s) {
		t.Errorf("carry: %s, want %s", s.Sum(), recompute(s))
	}
	for i := range 5 {
		s.Remove(fmt.Sprint(i))
	}
	if s.Sum() != (digest.Hash{}) {
		t.Errorf("borrow: %s", s.Sum())
	}
}

func TestTopics(t *testing.T) {
	s := digest.NewSet()
	for _, topic := range []string{"c", "a", "b", "d"} {
		s.Put(topic, []byte("x"))
	}
	for _, tc := range []struct {
		after string
		n     int
		want  string
	}{{"", 0, "a b c d"}, {"", 2, "a b"}, {"b", 2, "c d"}, {"b", 9, "c d"}, {"bb", 1, "c"}, {"d", 5, ""}} {
		if got := strings.Join(s.Topics(tc.after, tc.n), " "); got != tc.want {
			t.Errorf("Topics(%q, %d) = %q, want %q", tc.after, tc.n, got, tc.want)
		}
	}
}
