package jsonschema_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	validator "github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/fairlead-io/fairlead/schemas/jsonschema"
)

const ext = ".schema.json"

func compile(t *testing.T) map[string]*validator.Schema {
	t.Helper()
	entries, err := jsonschema.FS.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	c := validator.NewCompiler()
	c.DefaultDraft(validator.Draft2020)
	out := map[string]*validator.Schema{}
	for _, e := range entries {
		b, err := jsonschema.FS.ReadFile(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		doc, err := validator.UnmarshalJSON(bytes.NewReader(b))
		if err != nil {
			t.Fatalf("%s: %v", e.Name(), err)
		}
		if err := c.AddResource(e.Name(), doc); err != nil {
			t.Fatalf("%s: %v", e.Name(), err)
		}
		s, err := c.Compile(e.Name())
		if err != nil {
			t.Fatalf("%s: %v", e.Name(), err)
		}
		out[strings.TrimSuffix(e.Name(), ext)] = s
	}
	return out
}

// TestGoldens holds every golden payload against its schema, and asks for a
// golden for every schema.
func TestGoldens(t *testing.T) {
	schemas := compile(t)
	files, err := filepath.Glob(filepath.Join("..", "payload", "testdata", "*.json"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no goldens: %v", err)
	}
	used := map[string]bool{}
	for _, f := range files {
		name, _, _ := strings.Cut(filepath.Base(f), ".")
		s, ok := schemas[name]
		if !ok {
			t.Errorf("%s: there is no %s%s", f, name, ext)
			continue
		}
		used[name] = true
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		v, err := validator.UnmarshalJSON(bytes.NewReader(b))
		if err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		if err := s.Validate(v); err != nil {
			t.Errorf("%s: %v", f, err)
		}
	}
	for name := range schemas {
		if !used[name] {
			t.Errorf("%s%s: no golden uses it", name, ext)
		}
	}
}

// TestRefuses shows that the schemas say no.
func TestRefuses(t *testing.T) {
	schemas := compile(t)
	for _, tc := range []struct{ schema, payload string }{
		{"link", `{}`},
		{"link", `null`},
		{"link", `{"online":"yes","since":1}`},
		{"digest", `{"epoch":"a","count":1,"sum":"00"}`},
		{"digest", `{"epoch":"a","count":-1,"sum":"00000000000000000000000000000000"}`},
		{"reading", `{"v":1}`},
		{"reading", `{"v":1,"t":1.5}`},
		{"reading", `{"v":0,"t":1,"q":"bad:timeout"}`}, // bad quality is never 0
		{"reading", `{"v":null,"t":1,"q":"good"}`},
		{"reading", `{"v":1,"t":1,"err":"range"}`},
		{"wish", `{"v":1,"rev":1}`},
		{"target", `{"v":1,"rev":1,"uid":"u","by":"me","t":1}`},
		{"set", `{}`},
		{"set", `{"v":1,"expires":1}`},
		{"set-reply", `{"ok":false}`},
		{"device-status", `{"uid":"u","rev":1,"state":"online","since":1}`},
		{"node", `{"agent":"v1"}`},
		{"node", `{"agent":"v1","os":"linux","arch":"amd64","cpus":1,"memoryBytes":1,"pods":true,"sealKey":"short"}`},
		{"node", `{"agent":"v1","os":"linux","arch":"amd64","cpus":1,"memoryBytes":1,"pods":true,"capacity":{"cpu":4}}`},
		{"node", `{"agent":"v1","os":"linux","arch":"amd64","cpus":1,"memoryBytes":1,"pods":true,"conditions":[{"type":"Ready","status":"yes","reason":"","message":"","since":1}]}`},
		{"pod", `{"uid":"u","rev":1,"metadata":{"name":"a","namespace":"d","uid":"u"}}`},
		{"pod", `{"uid":"u","rev":1,"metadata":{"name":"a","namespace":"d","uid":"u"},"spec":{"containers":[]},"gates":{"a":"yes"}}`},
		{"pod", `{"uid":"u","rev":1,"metadata":{"name":"a","namespace":"d","uid":"u"},"spec":{"containers":[]},"services":[{"name":"a"}]}`},
		{"configmap", `{"uid":"u","rev":1,"namespace":"d","name":"n","data":{"a":1}}`},
		{"sealed", `{"uid":"u","rev":1,"key":"k","sealed":"AA=="}`},
		{"sealed", `{"uid":"u","rev":1,"key":"1a92f23852dc908d"}`},
		{"secret-data", `{"data":{}}`},
		{"pod-tokens", `{"tokens":[{"audience":"","seconds":0,"token":"t","exp":1}]}`},
		{"reported-pod", `{"rev":1}`},
		{"reported-pod", `{"uid":"u","rev":1,"gone":"yes"}`},
		{"reported-pod", `{"uid":"u","rev":0,"static":{"metadata":{"name":"a","namespace":"d"}}}`},
		{"event-kubernetes", `{"id":"e","kind":"Pod","name":"n","reason":"R","message":"m","type":"Error","first":1,"last":1,"count":1,"component":"kubelet"}`},
		{"event-kubernetes", `{"id":"e","kind":"Pod","name":"n","reason":"R","message":"m","type":"Normal","first":1,"last":1,"count":0,"component":"kubelet"}`},
		{"event-gap", `{"epoch":"a","from":0,"to":1,"count":1,"bytes":1,"t":1}`},
		{"event-gap", `{"epoch":"a","from":1,"to":1,"bytes":1,"t":1}`},
		{"sync-request", `{}`},
		{"sync-request", `{"want":["fl/n/desired/pod/a/b"]}`},
		{"sync-manifest", `{"digest":{"epoch":"a","count":1,"sum":"00000000000000000000000000000000"},"topics":{"desired/x":"1"}}`},
		{"device", `{"uid":"u","rev":1,"namespace":"d","name":"n","model":"m","protocol":"modbus","properties":[]}`},
		{"device", `{"uid":"u","rev":1,"namespace":"d","name":"n","model":"m","protocol":"modbus","modbus":{"address":"a:1"},"properties":[{"name":"a","type":"int7","modbus":{"table":"coil","address":0}}]}`},
	} {
		v, err := validator.UnmarshalJSON(strings.NewReader(tc.payload))
		if err != nil {
			t.Fatal(err)
		}
		if schemas[tc.schema].Validate(v) == nil {
			t.Errorf("%s takes %s", tc.schema, tc.payload)
		}
	}
}
