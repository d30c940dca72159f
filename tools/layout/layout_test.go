package layout_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/fairlead-io/fairlead"

// rule says what the packages below one folder may import. Folders are relative
// to the module, import paths outside it are whole.
type rule struct {
	of     string   // the folder the rule is about
	except []string // folders below it with a rule of their own
	reason string

	// may lists the folders of this module that may be imported directly; the
	// folder itself always may. Tests follow it too, plus testsMay.
	may      []string
	testsMay []string

	// never lists import paths that may not be linked, however far down.
	// It binds the packages, not their tests.
	never []string
}

var rules = []rule{
	{
		of:     "schemas",
		reason: "the wire contract is what everybody agrees on, so it depends on nobody: a foreign mapper can import it and gets topics and payloads, not a broker or Kubernetes",
		never:  []string{"k8s.io", "sigs.k8s.io"},
	},
	{
		of:     "broker",
		except: []string{"broker/client"},
		reason: "one broker serves cloud and edge, so it knows topics but neither Kubernetes nor the edge",
		may:    []string{"schemas", "broker/client"},
		never:  []string{"k8s.io", "sigs.k8s.io"},
	},
	{
		of:       "broker/client",
		reason:   "mappers link the client, and a mapper must not carry a broker and its store",
		may:      []string{"schemas"},
		testsMay: []string{"broker"}, // real brokers in tests
		never:    []string{module + "/broker", "github.com/mochi-mqtt", "github.com/cockroachdb/pebble", "k8s.io", "sigs.k8s.io"},
	},
	{
		of:       "edge",
		except:   []string{"edge/pods/archive", "edge/cmd/fairlead-images"},
		reason:   "the edge restarts without the cloud and stays small: it meets the cloud over MQTT only, and memory is won by linking less",
		may:      []string{"schemas", "broker"},
		testsMay: []string{runtimeForTests, registryForTests}, // real containers in tests
		never:    []string{module + "/cloudbridge", "k8s.io/client-go", "k8s.io/kubernetes", "github.com/containerd/containerd"},
	},
	{
		of:       "edge/pods/archive",
		reason:   "containerd's client costs megabytes of memory: it stays in a command of its own, and this package apart from the agent",
		testsMay: []string{"edge/pods/cri", runtimeForTests},
		never:    []string{module + "/cloudbridge", "k8s.io/client-go", "k8s.io/kubernetes"},
	},
	{
		of:       "edge/cmd/fairlead-images",
		reason:   "the command is there for containerd's client alone",
		may:      []string{"edge/pods/archive"},
		testsMay: []string{runtimeForTests},
		never:    []string{module + "/cloudbridge", "k8s.io/client-go", "k8s.io/kubernetes"},
	},
	{
		of:     "cloudbridge",
		reason: "the cloud relies on MQTT semantics alone, so that an external broker and other agents can take a side's place",
		may:    []string{"schemas", "broker"},
		never:  []string{module + "/edge", "k8s.io/kubernetes"},
	},
	{
		of:       "mappers",
		reason:   "a mapper is an ordinary client of the bus: whatever it needs it gets as topics, so anybody can write one",
		may:      []string{"schemas", "broker/client"},
		testsMay: []string{"broker", slaveForTests}, // real brokers and slaves in tests
		never:    []string{module + "/broker", "github.com/mochi-mqtt", "github.com/cockroachdb/pebble", "k8s.io", "sigs.k8s.io"},
	},
	{
		of:     "deploy",
		reason: "manifests and samples are data: whoever embeds them imports deploy, not the other way round",
	},
}

// The tools that the tests of a part may import, which share them with the
// end-to-end tests.
const (
	slaveForTests    = "tools/testslave"    // a Modbus slave that is not ours
	runtimeForTests  = "tools/testruntime"  // a containerd of the test's own
	registryForTests = "tools/testregistry" // an image registry of the test's own
)

// clientBelowBroker are the packages that `never: module/broker` does not mean.
var clientBelowBroker = module + "/broker/client"

// topLevel are the only folders (and hidden entries) in the root, with what
// they hold; see the parts of the design.
var topLevel = map[string]string{
	"schemas":     "the wire: topics, payloads, CRDs",
	"broker":      "the embedded broker and its client",
	"cloudbridge": "Kubernetes <-> fabric",
	"edge":        "the agent",
	"mappers":     "the driver kit and drivers",
	"deploy":      "manifests, units, samples",
	"tools":       "development, simulators, benchmarks, tests over several parts",
	".ci":         "what a build machine runs",
}

// listed is what these tests read of `go list -json`.
type listed struct {
	ImportPath   string
	Standard     bool
	Imports      []string
	TestImports  []string
	XTestImports []string
	Deps         []string
	DepOnly      bool
}

// tree is the repository: its packages and their dependencies by import path,
// and its files, tracked or about to be.
type tree struct {
	root     string
	packages map[string]*listed
	files    []string // slash-separated, relative to root
}

// load runs go list and git once per test. They are processes of their own, so
// the files they read are read here too where it matters: go test's cache sees
// only what the test itself opens.
func load(t *testing.T) *tree {
	t.Helper()
	root := strings.TrimSpace(string(run(t, "", "go", "list", "-m", "-f", "{{.Dir}}")))
	tr := &tree{root: root, packages: map[string]*listed{}}

	dec := json.NewDecoder(bytes.NewReader(run(t, root, "go", "list", "-e", "-deps",
		"-json=ImportPath,Standard,Imports,TestImports,XTestImports,Deps,DepOnly", "./...")))
	for {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("decode go list: %v", err)
		}
		tr.packages[p.ImportPath] = &p
	}

	if _, err := os.Stat(filepath.Join(root, ".git")); err == nil {
		// Untracked files that nothing ignores are in: they are the next commit.
		out := run(t, root, "git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
		for name := range strings.SplitSeq(string(out), "\x00") {
			if _, err := os.Lstat(filepath.Join(root, filepath.FromSlash(name))); name != "" && err == nil {
				tr.files = append(tr.files, name)
			}
		}
	}

	// Make the cache of go test notice a new file anywhere in the tree.
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil //nolint:nilerr // what vanishes during the walk is no matter
		}
		switch d.Name() {
		case ".git", "bin", ".demo", ".task", "node_modules":
			return filepath.SkipDir
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func run(t *testing.T, dir, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skipf("%s is not installed", name)
	}
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, stderr.String())
	}
	return out
}

// below says whether an import path is the prefix or lies below it.
func below(importPath, prefix string) bool {
	return importPath == prefix || strings.HasPrefix(importPath, prefix+"/")
}

// folder is the path of a package inside this module.
func folder(importPath string) (string, bool) {
	return strings.CutPrefix(importPath, module+"/")
}

func belowAny(importPath string, prefixes []string) bool {
	return slices.ContainsFunc(prefixes, func(p string) bool { return below(importPath, p) })
}

// own lists the packages of this module the rule is about.
func (r rule) own(tr *tree) []*listed {
	var ps []*listed
	for _, p := range tr.packages {
		f, ok := folder(p.ImportPath)
		if ok && !p.DepOnly && below(f, r.of) && !belowAny(f, r.except) {
			ps = append(ps, p)
		}
	}
	slices.SortFunc(ps, func(a, b *listed) int { return strings.Compare(a.ImportPath, b.ImportPath) })
	return ps
}

// check returns what breaks the rule, one line each.
func (r rule) check(tr *tree) []string {
	var broken []string
	fail := func(format string, args ...any) { broken = append(broken, fmt.Sprintf(format, args...)) }
	for _, p := range r.own(tr) {
		may := append([]string{r.of}, r.may...)
		for _, i := range p.Imports {
			if f, ok := folder(i); ok && !belowAny(f, may) {
				fail("%s imports %s", p.ImportPath, i)
			}
		}
		for _, i := range slices.Concat(p.TestImports, p.XTestImports) {
			if f, ok := folder(i); ok && !belowAny(f, append(may, r.testsMay...)) {
				fail("the tests of %s import %s", p.ImportPath, i)
			}
		}
		for _, n := range r.never {
			// One example of a whole module that is linked says enough.
			if i := slices.IndexFunc(p.Deps, func(d string) bool {
				return below(d, n) && !(n == module+"/broker" && below(d, clientBelowBroker))
			}); i >= 0 {
				fail("%s links %s, through %s", p.ImportPath, p.Deps[i], tr.through(p, p.Deps[i]))
			}
		}
	}
	return broken
}

// through names a direct import of p that brings the dependency in.
func (tr *tree) through(p *listed, dep string) string {
	for _, i := range p.Imports {
		if i == dep {
			return "its own import"
		}
		if q := tr.packages[i]; q != nil && slices.Contains(q.Deps, dep) {
			return i
		}
	}
	return "?"
}

func TestImportDirections(t *testing.T) {
	tr := load(t)
	for _, r := range rules {
		t.Run(strings.ReplaceAll(r.of, "/", "."), func(t *testing.T) {
			if len(r.own(tr)) == 0 && r.of != "deploy" {
				t.Errorf("no package below %s: a rule that nothing falls under guards nothing", r.of)
			}
			for _, line := range r.check(tr) {
				t.Errorf("%s\n\tbut: %s", line, r.reason)
			}
		})
	}
}

// TestRulesCatch holds the rules against imports that break them: a rule that
// cannot fail is worse than none.
func TestRulesCatch(t *testing.T) {
	for _, tc := range []struct {
		from, imports string
		test          bool // the import is in a test file
		broken        bool
	}{
		{from: "schemas/topic", imports: module + "/schemas", broken: false},
		{from: "schemas/topic", imports: module + "/broker", broken: true},
		{from: "schemas/crd", imports: "k8s.io/api/core/v1", broken: true},
		{from: "schemas/crd", imports: "k8s.io/api/core/v1", test: true, broken: false},
		{from: "broker", imports: module + "/schemas/topic", broken: false},
		{from: "broker", imports: module + "/broker/client", broken: false},
		{from: "broker/store", imports: module + "/edge", broken: true},
		{from: "broker/store", imports: module + "/tools/modbussim", test: true, broken: true},
		{from: "broker/client", imports: module + "/schemas", broken: false},
		{from: "broker/client", imports: module + "/broker", broken: true},
		{from: "broker/client", imports: module + "/broker", test: true, broken: false},
		{from: "edge/link", imports: module + "/broker/client", broken: false},
		{from: "edge/link", imports: module + "/cloudbridge", broken: true},
		{from: "edge/link", imports: module + "/cloudbridge", test: true, broken: true},
		{from: "edge/cmd/fairlead-edge", imports: "k8s.io/client-go/kubernetes", broken: true},
		{from: "edge/pods", imports: "k8s.io/api/core/v1", broken: false},
		{from: "edge/pods/cri", imports: module + "/tools/testruntime", test: true, broken: false},
		{from: "edge/pods/cri", imports: module + "/tools/testruntime", broken: true},
		{from: "edge/pods/cri", imports: "github.com/containerd/containerd/v2/client", broken: true},
		{from: "edge/pods/archive", imports: "github.com/containerd/containerd/v2/client", broken: false},
		{from: "edge/pods/archive", imports: module + "/edge/pods/cri", broken: true},
		{from: "edge/pods", imports: module + "/mappers/driver", broken: true},
		{from: "cloudbridge/status", imports: "k8s.io/client-go/kubernetes", broken: false},
		{from: "cloudbridge/status", imports: module + "/edge/twin", broken: true},
		{from: "mappers/modbus", imports: module + "/broker/client", broken: false},
		{from: "mappers/modbus", imports: module + "/broker", broken: true},
		{from: "mappers/modbus", imports: module + "/broker/store", broken: true},
		{from: "mappers/modbus", imports: module + "/broker", test: true, broken: false},
		{from: "mappers/modbus", imports: "k8s.io/apimachinery/pkg/types", broken: true},
	} {
		from := &listed{ImportPath: module + "/" + tc.from}
		if tc.test {
			from.XTestImports = []string{tc.imports}
		} else {
			from.Imports, from.Deps = []string{tc.imports}, []string{tc.imports}
		}
		tr := &tree{packages: map[string]*listed{from.ImportPath: from}}
		var broken []string
		for _, r := range rules {
			broken = append(broken, r.check(tr)...)
		}
		if (len(broken) > 0) != tc.broken {
			t.Errorf("%s imports %s (test: %t): broken %q, want %t", tc.from, tc.imports, tc.test, broken, tc.broken)
		}
	}
}

func TestNobodyImportsToolsOrCommands(t *testing.T) {
	for importPath, p := range load(t).packages {
		from, ok := folder(importPath)
		if !ok || p.DepOnly {
			continue
		}
		for _, i := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			to, ok := folder(i)
			if !ok {
				continue
			}
			if below(to, "tools") && !below(from, "tools") && (to != slaveForTests && to != runtimeForTests && to != registryForTests || slices.Contains(p.Imports, i)) {
				t.Errorf("%s imports %s\n\tbut: tools are for developers and may need anything; what a product needs belongs to a part", from, to)
			}
			if home := command(to); home != "" && !below(from, home) {
				t.Errorf("%s imports %s\n\tbut: a command is flags and signals around run(ctx); what others need belongs to a package", from, to)
			}
		}
	}
}

// command returns the folder of the command that f lies in, or "".
func command(f string) string {
	parts := strings.Split(f, "/")
	if i := slices.Index(parts, "cmd"); i >= 0 && i+1 < len(parts) {
		return strings.Join(parts[:i+2], "/")
	}
	return ""
}

func TestTopLevelFolders(t *testing.T) {
	seen := map[string]bool{}
	for _, name := range needFiles(t, load(t)) {
		top, _, inFolder := strings.Cut(name, "/")
		if _, ok := topLevel[top]; inFolder && !ok && !seen[top] {
			t.Errorf("%s/ is not a part of the design: a new part changes the design first, anything else belongs into one", top)
		}
		seen[top] = true
	}
}

// needFiles skips the test where there is no git checkout, as in an archive of
// the sources.
func needFiles(t *testing.T, tr *tree) []string {
	t.Helper()
	if len(tr.files) == 0 {
		t.Skip("not a git checkout: no list of tracked files")
	}
	return tr.files
}

// TestPackagesHaveDocs reads the sources rather than go list, so that modules
// of their own below tools are seen as well.
func TestPackagesHaveDocs(t *testing.T) {
	tr := load(t)
	documented := map[string]bool{} // package folder and name -> has a doc comment
	for _, name := range needFiles(t, tr) {
		// Tests of an external package (package x_test) need no comment of
		// their own, go ignores testdata and names with _ or . in front.
		if path.Ext(name) != ".go" || strings.HasSuffix(name, "_test.go") || strings.Contains("/"+name, "/testdata/") || strings.HasPrefix(path.Base(name), "_") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(tr.root, filepath.FromSlash(name)), nil, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			t.Errorf("parse %s: %v", name, err)
			continue
		}
		key := path.Dir(name) + " (package " + f.Name.Name + ")"
		documented[key] = documented[key] || f.Doc != nil && strings.TrimSpace(f.Doc.Text()) != ""
	}
	for key, ok := range documented {
		if !ok {
			t.Errorf("%s has no doc comment: say in doc.go what it is for, with a short example", key)
		}
	}
}

// machinePath is an absolute path of a developer's or a build machine's own.
var machinePath = regexp.MustCompile(`(^|[^A-Za-z0-9_.})~*-])/(work|root)/`)

// registries are hosts that no tracked file may name: what to download is in
// go.mod and package.json, from where is the choice of whoever builds.
func registries() []string {
	hosts := []string{"proxy." + "golang.org", "sum." + "golang.org", "registry." + "npmjs.org"}
	for _, name := range []string{"GOPROXY", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "npm_config_registry", "PIP_INDEX_URL"} {
		for value := range strings.FieldsFuncSeq(os.Getenv(name), func(r rune) bool { return r == ',' || r == '|' }) {
			if u, err := url.Parse(value); err == nil && strings.Contains(u.Hostname(), ".") && !strings.HasPrefix(u.Hostname(), "127.") {
				hosts = append(hosts, u.Hostname())
			}
		}
	}
	return hosts
}

func TestTrackedFilesAreOfNoMachine(t *testing.T) {
	tr := load(t)
	hosts := registries()
	for _, name := range needFiles(t, tr) {
		file := filepath.Join(tr.root, filepath.FromSlash(name))
		if info, err := os.Lstat(file); err != nil || !info.Mode().IsRegular() {
			continue
		}
		content, err := os.ReadFile(file)
		if err != nil {
			t.Errorf("read tracked file: %v", err)
			continue
		}
		if bytes.IndexByte(content, 0) >= 0 {
			continue // not text
		}
		for n, line := range strings.Split(string(content), "\n") {
			if machinePath.MatchString(line) {
				t.Errorf("%s:%d: an absolute path of one machine: %.120s", name, n+1, strings.TrimSpace(line))
			}
			for _, host := range hosts {
				if strings.Contains(line, host) {
					t.Errorf("%s:%d: names the registry host %s; leave it to the settings of whoever builds", name, n+1, host)
				}
			}
		}
	}
}

func TestMachinePath(t *testing.T) {
	for line, want := range map[string]bool{
		`cd /wor` + `k/main`:                true,
		`data := "/roo` + `t/.kube/config"`: true,
		`/roo` + `t/x`:                      true,
		`import "example.com/work/queue"`:   false,
		`$HOME/work/x and ~/work/y`:         false,
		`{{.Dir}}/root/x ${top}/work/z`:     false,
		`framework/ a/root/b`:               false,
	} {
		if machinePath.MatchString(line) != want {
			t.Errorf("machinePath on %q: %t, want %t", line, !want, want)
		}
	}
}
