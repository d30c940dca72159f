package device_test

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"

	"github.com/fairlead-io/fairlead/schemas/device"
)

var rewrite = flag.Bool("rewrite", false, "rewrite the goldens in testdata")

// TestDecodeGolden reads testdata/decode.txt: a line that begins with { is a
// property, a line "value => outcome" is a value decoded by it. The outcome is
// the native value's Go form and its JSON form, or the reason and the sentence
// of a refusal.
func TestDecodeGolden(t *testing.T) {
	const file = "testdata/decode.txt"
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var p device.Property
	var out strings.Builder
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSuffix(line, "\n")
		in, want, isCase := strings.Cut(line, " => ")
		switch {
		case strings.HasPrefix(line, "#") || line == "":
		case !isCase:
			p = device.Property{Name: "x"}
			if err := json.Unmarshal([]byte(line), &p); err != nil {
				t.Fatalf("%s: %v", line, err)
			}
		default:
			got := outcome(&p, in)
			if got != want && !*rewrite {
				t.Errorf("%+v\n%s\ngot  %s\nwant %s", p, in, got, want)
			}
			line = in + " => " + got
		}
		fmt.Fprintln(&out, line)
	}
	if *rewrite {
		if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func outcome(p *device.Property, in string) string {
	v, err := p.Decode(json.RawMessage(in))
	if err != nil {
		var refused *device.ValueError
		if !errors.As(err, &refused) {
			return fmt.Sprintf("an error that is no ValueError: %v", err)
		}
		return fmt.Sprintf("refused (%s): %s", refused.Reason, refused.Detail)
	}
	enc := p.Type.Encode(v)
	again, err := p.Decode(enc)
	if err != nil || !p.Type.Equal(v, again) {
		return fmt.Sprintf("%v became %v, %v", v, again, err)
	}
	if b, ok := v.(json.RawMessage); ok {
		return fmt.Sprintf("json %s", b)
	}
	if s, ok := v.(string); ok {
		return fmt.Sprintf("string(%+q) %s", s, enc)
	}
	return fmt.Sprintf("%T(%v) %s", v, v, enc)
}

func TestEncode(t *testing.T) {
	for _, c := range []struct {
		typ  device.Type
		v    any
		want string
	}{
		{device.Bool, true, `true`},
		{device.Int64, int64(1 << 53), `9007199254740992`},
		{device.Int64, int64(1<<53 + 1), `"9007199254740993"`},
		{device.Int64, int64(-1 << 53), `-9007199254740992`},
		{device.Int64, int64(-1<<53 - 1), `"-9007199254740993"`},
		{device.Int64, int64(math.MinInt64), `"-9223372036854775808"`},
		{device.Uint64, uint64(math.MaxUint64), `"18446744073709551615"`},
		{device.Float32, float64(float32(0.1)), `0.1`},
		{device.Float64, 0.1, `0.1`},
		{device.Float64, 1e21, `1e+21`},
		{device.Float64, math.Copysign(0, -1), `-0`},
		{device.Float64, math.NaN(), `null`},
		{device.Float32, math.Inf(1), `null`},
		{device.Float64, math.Inf(-1), `null`},
		{device.String, "é\n<b>", `"é\n<b>"`},
		{device.Bytes, []byte{0, 255}, `"AP8="`},
		{device.Bytes, []byte{}, `""`},
		{device.JSON, json.RawMessage(`{"a":1}`), `{"a":1}`},
		{device.Int32, nil, `null`},
		{device.Int32, int32(7), `null`}, // not a native value
	} {
		if got := c.typ.Encode(c.v); string(got) != c.want {
			t.Errorf("%s %v: got %s; want %s", c.typ, c.v, got, c.want)
		}
	}
}

func TestCheckNativeValues(t *testing.T) {
	num := func(s string) *json.Number { n := json.Number(s); return &n }
	for _, c := range []struct {
		p    device.Property
		v    any
		want device.Reason
	}{
		{device.Property{Type: device.Float64, Min: num("0.1"), Max: num("0.1")}, 0.1, ""}, // the binary 0.1 is a little above
		{device.Property{Type: device.Float32, Max: num("0.1")}, float64(float32(0.1)), ""},
		{device.Property{Type: device.Float32, Max: num("0.1")}, float64(math.Nextafter32(0.1, 1)), device.ReasonRange},
		{device.Property{Type: device.Uint64, Max: num("18446744073709551614")}, uint64(math.MaxUint64), device.ReasonRange},
		{device.Property{Type: device.Uint64, Max: num("18446744073709551615")}, uint64(math.MaxUint64), ""},
		{device.Property{Type: device.Int64, Min: num("-9223372036854775808")}, int64(math.MinInt64), ""},
		{device.Property{Type: device.Float64, Max: num("1")}, math.NaN(), device.ReasonRange},
		{device.Property{Type: device.Float64}, math.NaN(), ""},
		{device.Property{Type: device.Bytes, MaxLength: 2}, []byte{1, 2, 3}, device.ReasonRange},
		{device.Property{Type: device.String, MaxLength: 2}, "é", ""},
		{device.Property{Type: device.Int8, Enum: []json.RawMessage{[]byte("1"), []byte("3")}}, int64(2), device.ReasonEnum},
		{device.Property{Type: device.Int8, Enum: []json.RawMessage{[]byte("1"), []byte("3")}}, int64(3), ""},
	} {
		err := c.p.Check(c.v)
		var refused *device.ValueError
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%+v %v: %v", c.p, c.v, err)
		case c.want != "" && (!errors.As(err, &refused) || refused.Reason != c.want):
			t.Errorf("%+v %v: got %v; want %s", c.p, c.v, err, c.want)
		}
	}
}

func TestChanged(t *testing.T) {
	for _, c := range []struct {
		typ       device.Type
		deadband  float64
		last, now any
		want      bool
	}{
		{device.Float64, 0, 1.0, 1.0, false},
		{device.Float64, 0, 1.0, math.Nextafter(1, 2), true},
		{device.Float32, 0, 1.0, math.Nextafter(1, 2), false}, // the same float32
		{device.Float64, 0, math.NaN(), math.NaN(), false},
		{device.Float64, 0.5, 1.0, math.NaN(), true},
		{device.Float64, 0.5, 20.0, 20.4, false},
		{device.Float64, 0.5, 20.0, 20.5, true},
		{device.Float64, 0.1, 0.3, 0.2, true}, // in binary 0.3 - 0.2 is below 0.1
		{device.Float64, 0.5, 20.5, 20.0, true},
		{device.Int64, 2, int64(math.MaxInt64), int64(math.MaxInt64 - 1), false}, // float64 could not tell
		{device.Int64, 2, int64(math.MinInt64), int64(math.MaxInt64), true},
		{device.Uint64, 1, uint64(math.MaxUint64), uint64(math.MaxUint64 - 1), true},
		{device.Bool, 0, true, false, true},
		{device.String, 0, "a", "a", false},
		{device.Bytes, 0, []byte{1}, []byte{1}, false},
		{device.Bytes, 0, []byte{1}, []byte{2}, true},
		{device.JSON, 0, json.RawMessage(`1`), json.RawMessage(`2`), true},
		{device.Int32, 0, nil, int64(1), true},
		{device.Int32, 5, nil, int64(1), true},
	} {
		p := device.Property{Type: c.typ, Deadband: c.deadband}
		if got := p.Changed(c.last, c.now); got != c.want {
			t.Errorf("%s deadband %v, %v to %v: got %t", c.typ, c.deadband, c.last, c.now, got)
		}
	}
}

func TestDuration(t *testing.T) {
	var d device.Duration
	if err := d.UnmarshalText([]byte("1m30s")); err != nil || d.Or(0).String() != "1m30s" {
		t.Errorf("got %v, %v", d.Or(0), err)
	}
	if err := d.UnmarshalText([]byte("5")); err == nil || !strings.Contains(err.Error(), "unit") {
		t.Errorf("a bare number: %v", err)
	}
	if got := device.Duration(-1).Or(7); got != 7 {
		t.Errorf("negative: %v", got)
	}
	b, err := json.Marshal(struct {
		A device.Duration `json:"a,omitempty"`
		B device.Duration `json:"b,omitempty"`
	}{A: device.Duration(5e8)})
	if err != nil || string(b) != `{"a":"500ms"}` {
		t.Errorf("got %s, %v", b, err)
	}
}

// FuzzDecode: whatever is accepted survives its own JSON form, and nothing
// panics or takes long.
func FuzzDecode(f *testing.F) {
	types := []device.Type{device.Bool, device.Int8, device.Int16, device.Int32, device.Int64, device.Uint8, device.Uint16,
		device.Uint32, device.Uint64, device.Float32, device.Float64, device.String, device.Bytes, device.JSON, "none"}
	for i := range types {
		for _, s := range []string{`1`, `"1"`, `-0`, `1e999999999`, `"9007199254740993"`, `null`, `"AP8="`, `{"a":[1, 2]}`, `"\ud800"`, `1.0`} {
			f.Add(uint8(i), []byte(s))
		}
	}
	f.Fuzz(func(t *testing.T, typ uint8, b []byte) {
		p := device.Property{Name: "x", Type: types[int(typ)%len(types)]}
		v, err := p.Decode(b)
		if err != nil {
			var refused *device.ValueError
			if !errors.As(err, &refused) || refused.Reason == "" || refused.Detail == "" {
				t.Fatalf("%s %q: %v is no complete ValueError", p.Type, b, err)
			}
			return
		}
		enc := p.Type.Encode(v)
		if !json.Valid(enc) {
			t.Fatalf("%s %q: encoded as %q", p.Type, b, enc)
		}
		again, err := p.Decode(enc)
		if err != nil || !p.Type.Equal(v, again) || p.Changed(v, again) {
			t.Fatalf("%s %q: %v became %v by %s, %v", p.Type, b, v, again, enc, err)
		}
	})
}
