package topic_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

// built holds every builder with the topic it must give and what Parse must
// find in it.
var built = []struct {
	give topic.Topic
	want string
	part topic.Parsed
}{
	{topic.DesiredPod("plant-7", "default", "web"), "fl/plant-7/desired/pod/default/web",
		topic.Parsed{Node: "plant-7", Kind: topic.KindDesiredPod, Namespace: "default", Name: "web"}},
	{topic.DesiredConfigMap("plant-7", "default", "web.conf"), "fl/plant-7/desired/configmap/default/web.conf",
		topic.Parsed{Node: "plant-7", Kind: topic.KindDesiredConfigMap, Namespace: "default", Name: "web.conf"}},
	{topic.DesiredSecret("plant-7", "default", "tls"), "fl/plant-7/desired/secret/default/tls",
		topic.Parsed{Node: "plant-7", Kind: topic.KindDesiredSecret, Namespace: "default", Name: "tls"}},
	{topic.DesiredToken("plant-7", "default", "web"), "fl/plant-7/desired/token/default/web",
		topic.Parsed{Node: "plant-7", Kind: topic.KindDesiredToken, Namespace: "default", Name: "web"}},
	{topic.DesiredDevice("plant-7", "default", "pump-1"), "fl/plant-7/desired/device/default/pump-1",
		topic.Parsed{Node: "plant-7", Kind: topic.KindDesiredDevice, Namespace: "default", Name: "pump-1"}},
	{topic.DesiredTwin("plant-7", "default", "pump-1", "speed"), "fl/plant-7/desired/twin/default/pump-1/speed",
		topic.Parsed{Node: "plant-7", Kind: topic.KindDesiredTwin, Namespace: "default", Name: "pump-1", Property: "speed"}},
	{topic.DesiredDigest("plant-7"), "fl/plant-7/desired/digest",
		topic.Parsed{Node: "plant-7", Kind: topic.KindDesiredDigest}},
	{topic.ReportedLink("plant-7"), "fl/plant-7/reported/link",
		topic.Parsed{Node: "plant-7", Kind: topic.KindReportedLink}},
	{topic.ReportedNode("plant-7"), "fl/plant-7/reported/node",
		topic.Parsed{Node: "plant-7", Kind: topic.KindReportedNode}},
	{topic.ReportedPod("plant-7", "default", "web"), "fl/plant-7/reported/pod/default/web",
		topic.Parsed{Node: "plant-7", Kind: topic.KindReportedPod, Namespace: "default", Name: "web"}},
	{topic.ReportedDevice("plant-7", "default", "pump-1"), "fl/plant-7/reported/device/default/pump-1",
		topic.Parsed{Node: "plant-7", Kind: topic.KindReportedDevice, Namespace: "default", Name: "pump-1"}},
	{topic.ReportedTarget("plant-7", "default", "pump-1", "speed"), "fl/plant-7/reported/target/default/pump-1/speed",
		topic.Parsed{Node: "plant-7", Kind: topic.KindReportedTarget, Namespace: "default", Name: "pump-1", Property: "speed"}},
	{topic.ReportedTwin("plant-7", "default", "pump-1", "P_1.a-b"), "fl/plant-7/reported/twin/default/pump-1/P_1.a-b",
		topic.Parsed{Node: "plant-7", Kind: topic.KindReportedTwin, Namespace: "default", Name: "pump-1", Property: "P_1.a-b"}},
	{topic.ReportedDigest("plant-7"), "fl/plant-7/reported/digest",
		topic.Parsed{Node: "plant-7", Kind: topic.KindReportedDigest}},
	{topic.Set("plant-7", "default", "pump-1", "speed"), "fl/plant-7/set/default/pump-1/speed",
		topic.Parsed{Node: "plant-7", Kind: topic.KindSet, Namespace: "default", Name: "pump-1", Property: "speed"}},
	{topic.EventGap("plant-7"), "fl/plant-7/event/gap", topic.Parsed{Node: "plant-7", Kind: topic.KindEventGap}},
	{topic.EventKubernetes("plant-7", "default", "Pod", "web.1"), "fl/plant-7/event/kubernetes/default/Pod/web.1",
		topic.Parsed{Node: "plant-7", Kind: topic.KindEventKubernetes, Namespace: "default", Regarding: "Pod", Name: "web.1"}},
	{topic.SyncRequest("plant-7", topic.Desired), "fl/plant-7/sync/desired/request",
		topic.Parsed{Node: "plant-7", Kind: topic.KindSyncDesiredRequest}},
	{topic.SyncManifest("plant-7", topic.Desired), "fl/plant-7/sync/desired/manifest",
		topic.Parsed{Node: "plant-7", Kind: topic.KindSyncDesiredManifest}},
	{topic.SyncRequest("plant-7", topic.Reported), "fl/plant-7/sync/reported/request",
		topic.Parsed{Node: "plant-7", Kind: topic.KindSyncReportedRequest}},
	{topic.SyncManifest("plant-7", topic.Reported), "fl/plant-7/sync/reported/manifest",
		topic.Parsed{Node: "plant-7", Kind: topic.KindSyncReportedManifest}},
	// No builder of their own yet: put together from their parts.
	{topic.Parsed{Node: "a.b", Kind: topic.KindEvent, Rest: "alarm/pump-1/dry run"}.Topic(), "fl/a.b/event/alarm/pump-1/dry run",
		topic.Parsed{Node: "a.b", Kind: topic.KindEvent, Rest: "alarm/pump-1/dry run"}},
	{topic.Parsed{Node: "a.b", Kind: topic.KindEvent, Rest: "gaps"}.Topic(), "fl/a.b/event/gaps",
		topic.Parsed{Node: "a.b", Kind: topic.KindEvent, Rest: "gaps"}},
}

func TestBuildAndParse(t *testing.T) {
	seen := map[topic.Kind]bool{}
	for _, tc := range built {
		seen[tc.part.Kind] = true
		if string(tc.give) != tc.want {
			t.Errorf("built %q, want %q", tc.give, tc.want)
		}
		p, err := topic.Parse(tc.want)
		if err != nil {
			t.Errorf("Parse(%q): %v", tc.want, err)
			continue
		}
		if p != tc.part {
			t.Errorf("Parse(%q) = %+v, want %+v", tc.want, p, tc.part)
		}
		if p.Topic() != topic.Topic(tc.want) {
			t.Errorf("Parse(%q).Topic() = %q", tc.want, p.Topic())
		}
		if !topic.OfKind("+", p.Kind).Match(tc.give) || !topic.OfKind(p.Node, p.Kind).Match(tc.give) {
			t.Errorf("OfKind(%s) does not select %q", p.Kind, tc.want)
		}
		if !topic.NodeAll(p.Node).Match(tc.give) || topic.NodeAll("other").Match(tc.give) {
			t.Errorf("NodeAll does not tell the node of %q", tc.want)
		}
	}
	for _, k := range topic.Kinds() {
		if !seen[k] {
			t.Errorf("kind %s has no case", k)
		}
	}
}

// TestContract pins who writes what, what is kept and what a digest covers: a
// change here is a change of the wire contract (schemas/README.md).
func TestContract(t *testing.T) {
	const (
		cloud, node, mapper, local = topic.WriterCloud, topic.WriterNode, topic.WriterMapper, topic.WriterLocal
		none                       = topic.Direction(255)
	)
	want := []struct {
		kind     topic.Kind
		name     string
		writer   topic.Writer
		retained bool
		digest   topic.Direction
	}{
		{topic.KindDesiredPod, "desired/pod", cloud, true, topic.Desired},
		{topic.KindDesiredConfigMap, "desired/configmap", cloud, true, topic.Desired},
		{topic.KindDesiredSecret, "desired/secret", cloud, true, topic.Desired},
		{topic.KindDesiredToken, "desired/token", cloud, true, topic.Desired},
		{topic.KindDesiredDevice, "desired/device", cloud, true, topic.Desired},
		{topic.KindDesiredTwin, "desired/twin", cloud, true, topic.Desired},
		{topic.KindDesiredDigest, "desired/digest", cloud, true, none},
		{topic.KindReportedLink, "reported/link", node, true, none},
		{topic.KindReportedNode, "reported/node", node, true, topic.Reported},
		{topic.KindReportedPod, "reported/pod", node, true, topic.Reported},
		{topic.KindReportedDevice, "reported/device", mapper, true, topic.Reported},
		{topic.KindReportedTarget, "reported/target", node, true, topic.Reported},
		{topic.KindReportedTwin, "reported/twin", mapper, true, topic.Reported},
		{topic.KindReportedDigest, "reported/digest", node, true, none},
		{topic.KindSet, "set", local, false, none},
		{topic.KindEventGap, "event/gap", node, false, none},
		{topic.KindEventKubernetes, "event/kubernetes", node, false, none},
		{topic.KindEvent, "event", local, false, none},
		{topic.KindSyncDesiredRequest, "sync/desired/request", node, false, none},
		{topic.KindSyncDesiredManifest, "sync/desired/manifest", cloud, false, none},
		{topic.KindSyncReportedRequest, "sync/reported/request", cloud, false, none},
		{topic.KindSyncReportedManifest, "sync/reported/manifest", node, false, none},
	}
	if len(want) != len(topic.Kinds()) {
		t.Errorf("%d kinds, want %d", len(topic.Kinds()), len(want))
	}
	for _, w := range want {
		k := w.kind
		if k.String() != w.name || k.Writer() != w.writer || k.Retained() != w.retained {
			t.Errorf("%s: name %q writer %d retained %t, want %q %d %t",
				w.name, k.String(), k.Writer(), k.Retained(), w.name, w.writer, w.retained)
		}
		d, ok := topic.Parsed{Kind: k}.Direction()
		if ok != (w.digest != none) || ok && d != w.digest {
			t.Errorf("%s: direction %v, %t", w.name, d, ok)
		}
	}
	if topic.KindUnknown.String() != "unknown" || topic.KindUnknown.Writer() != topic.WriterNone {
		t.Error("the unknown kind has a name or a writer")
	}
}

// TestReadme holds the topics table of the contract's page against the code.
func TestReadme(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	writers := map[topic.Writer]string{topic.WriterCloud: "cloud", topic.WriterNode: "node", topic.WriterMapper: "mapper", topic.WriterLocal: "local"}
	rows := map[string][]string{}
	var order []string
	for line := range strings.Lines(string(page)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if len(cells) != 5 || !strings.HasPrefix(cells[0], " `") {
			continue
		}
		path, _, _ := strings.Cut(strings.Trim(cells[0], " `"), "/<")
		order = append(order, path)
		for _, c := range cells[1:4] {
			rows[path] = append(rows[path], strings.TrimSpace(c))
		}
	}
	for i, k := range topic.Kinds() {
		want := []string{writers[k.Writer()], "no", "–"}
		if k.Retained() {
			want[1] = "yes"
		}
		if d, ok := (topic.Parsed{Kind: k}).Direction(); ok {
			want[2] = d.String()
		}
		if got := rows[k.String()]; !slices.Equal(got, want) {
			t.Errorf("README.md says %q of %s, want %q", got, k, want)
		}
		if i >= len(order) || order[i] != k.String() {
			t.Errorf("README.md: row %d is not %s", i, k)
		}
	}
	if len(order) != len(topic.Kinds()) {
		t.Errorf("README.md has %d topics, want %d", len(order), len(topic.Kinds()))
	}
}

func TestDirection(t *testing.T) {
	for _, tc := range []struct {
		d                   topic.Direction
		name, digest        string
		all, nodes          topic.Filter
		selected, unrelated topic.Topic
	}{
		{topic.Desired, "desired", "fl/n/desired/digest", "fl/n/desired/#", "fl/+/desired/#",
			topic.DesiredPod("n", "d", "w"), topic.ReportedPod("n", "d", "w")},
		{topic.Reported, "reported", "fl/n/reported/digest", "fl/n/reported/#", "fl/+/reported/#",
			topic.ReportedPod("n", "d", "w"), topic.DesiredPod("n", "d", "w")},
	} {
		if tc.d.String() != tc.name || string(tc.d.Digest("n")) != tc.digest || tc.d.All("n") != tc.all || tc.d.AllNodes() != tc.nodes {
			t.Errorf("%s: %q %q %q", tc.d, tc.d.Digest("n"), tc.d.All("n"), tc.d.AllNodes())
		}
		if !tc.d.All("n").Match(tc.selected) || tc.d.All("n").Match(tc.unrelated) {
			t.Errorf("%s: All selects the wrong half", tc.d)
		}
	}
	if f := topic.OfDevice("n", topic.KindReportedTwin, "d", "p"); f != "fl/n/reported/twin/d/p/#" {
		t.Errorf("OfDevice = %q", f)
	}
}

func TestParseRefuses(t *testing.T) {
	long := strings.Repeat("a", 254)
	for _, tc := range []struct{ topic, why string }{
		{"", "begin with fl/"},
		{"fl", "begin with fl/"},
		{"flx/n/reported/node", "begin with fl/"},
		{"/fl/n/reported/node", "begin with fl/"},
		{"fl/", "nothing follows the node"},
		{"fl/n", "nothing follows the node"},
		{"fl//reported/node", `node ""`},
		{"fl/N/reported/node", `node "N"`},
		{"fl/-n/reported/node", `node "-n"`},
		{"fl/n-/reported/node", `node "n-"`},
		{"fl/n./reported/node", `node "n."`},
		{"fl/a..b/reported/node", `node "a..b"`},
		{"fl/a-.b/reported/node", `node "a-.b"`},
		{"fl/+/reported/node", `node "+"`},
		{"fl/" + long + "/reported/node", "1 to 253 characters"},
		{"fl/n/", "no kind"},
		{"fl/n/reported", "no kind"},
		{"fl/n/reported/nodes", "no kind"},
		{"fl/n/Reported/node", "no kind"},
		{"fl/n/sync/desired", "no kind"},
		{"fl/n/reported/node/", "no further level"},
		{"fl/n/reported/node/x", "no further level"},
		{"fl/n/desired/digest/", "no further level"},
		{"fl/n/desired/pod", "wants <namespace>/<name>"},
		{"fl/n/desired/pod/", "wants <namespace>/<name>"},
		{"fl/n/desired/pod/default", "wants <namespace>/<name>"},
		{"fl/n/desired/pod/default/", `name ""`},
		{"fl/n/desired/pod//web", `namespace ""`},
		{"fl/n/desired/pod/default/web/x", "wants <namespace>/<name>"},
		{"fl/n/desired/pod/default/#", `name "#"`},
		{"fl/n/desired/pod/default/Web", `name "Web"`},
		{"fl/n/set/default/pump-1", "wants <namespace>/<device>/<property>"},
		{"fl/n/set/default/pump-1/", `property ""`},
		{"fl/n/set/default/pump-1/1st", `property "1st"`},
		{"fl/n/set/default/pump-1/a b", `property "a b"`},
		{"fl/n/set/default/pump-1/speed\n", "property"},
		{"fl/n/set/default/pump-1/" + strings.Repeat("a", 64), "property"},
		{"fl/n/event", "needs a kind of event"},
		{"fl/n/event/", "needs a kind of event"},
		{"fl/n/event/gap/", "takes no further level"},
		{"fl/n/event/gap/x", "takes no further level"},
		{"fl/n/event/kubernetes", "wants <namespace>/<kind>/<name>"},
		{"fl/n/event/kubernetes/default/Pod", "wants <namespace>/<kind>/<name>"},
		{"fl/n/event/kubernetes/default/Pod/web/x", "wants <namespace>/<kind>/<name>"},
		{"fl/n/event/kubernetes/default/pod/web", `kind "pod"`},
		{"fl/n/event/kubernetes/default/Pod/Web", `name "Web"`},
		{"fl/n/event/alarm/#", "no wildcard"},
		{"fl/n/event/alarm/\x00", "no zero byte"},
	} {
		p, err := topic.Parse(tc.topic)
		if err == nil {
			t.Errorf("Parse(%q) = %+v, want an error", tc.topic, p)
			continue
		}
		if !errors.Is(err, topic.ErrForeign) || !strings.Contains(err.Error(), tc.why) {
			t.Errorf("Parse(%q): %v; want ErrForeign with %q", tc.topic, err, tc.why)
		}
		if p != (topic.Parsed{}) {
			t.Errorf("Parse(%q) gives parts beside its error: %+v", tc.topic, p)
		}
	}
}

func TestOwned(t *testing.T) {
	for s, want := range map[string]bool{"fl": true, "fl/": true, "fl/n": true, "": false, "flx": false, "/fl/n": false, "FL/n": false} {
		if topic.Owned(s) != want {
			t.Errorf("Owned(%q) = %t", s, !want)
		}
	}
}

// TestMatch holds the examples of MQTT 5 section 4.7 and the corners around them.
func TestMatch(t *testing.T) {
	for _, tc := range []struct {
		filter topic.Filter
		topic  topic.Topic
		want   bool
	}{
		// 4.7.1.2, the multi-level wildcard
		{"sport/tennis/player1/#", "sport/tennis/player1", true},
		{"sport/tennis/player1/#", "sport/tennis/player1/ranking", true},
		{"sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", true},
		{"sport/tennis/player1/#", "sport/tennis/player2", false},
		{"sport/#", "sport", true},
		{"sport/#", "sports", false},
		{"#", "a", true},
		{"#", "a/b", true},
		{"#", "/", true},
		// 4.7.1.3, the single-level wildcard
		{"sport/tennis/+", "sport/tennis/player1", true},
		{"sport/tennis/+", "sport/tennis/player1/ranking", false},
		{"sport/+", "sport", false},
		{"sport/+", "sport/", true},
		{"+", "sport", true},
		{"+/tennis/#", "sport/tennis", true},
		{"sport/+/player1", "sport/tennis/player1", true},
		{"sport/+/player1", "sport/tennis/player2", false},
		{"+/+", "/finance", true},
		{"/+", "/finance", true},
		{"+", "/finance", false},
		{"+/#", "/finance", true},
		// 4.7.2, topics beginning with $
		{"#", "$SYS/x", false},
		{"+/x", "$SYS/x", false},
		{"+/#", "$SYS", false},
		{"$SYS/#", "$SYS/x", true},
		{"$SYS/+/b", "$SYS/a/b", true},
		{"a/#", "a/$b", true},
		// 4.7.3, names are compared level by level, case and all
		{"ACCOUNTS", "Accounts", false},
		{"a/b", "a/b", true},
		{"a/b", "a/b/", false},
		{"a/b/", "a/b", false},
		{"a//b", "a//b", true},
		{"a/+/b", "a//b", true},
		{"a/b", "a", false},
		{"a", "a/b", false},
		{"a/+/+", "a/b", false},
		{"a/b/#", "a", false},
		{"a/+/#", "a/b", true},
	} {
		if got := tc.filter.Match(tc.topic); got != tc.want {
			t.Errorf("%q.Match(%q) = %t", tc.filter, tc.topic, got)
		}
	}
}

func TestCovers(t *testing.T) {
	for _, tc := range []struct {
		f, g topic.Filter
		want bool
	}{
		{"a/b", "a/b", true},
		{"a/b", "a/c", false},
		{"a/b", "a/+", false},
		{"a/b", "a/#", false},
		{"a/+", "a/b", true},
		{"a/+", "a/+", true},
		{"a/+", "a/#", false},
		{"a/+", "a", false},
		{"a/+", "a/b/c", false},
		{"a/#", "a", true},
		{"a/#", "a/b/c", true},
		{"a/#", "a/+/c", true},
		{"a/#", "a/#", true},
		{"a/#", "#", false},
		{"a/#", "+/b", false},
		{"a/#", "b", false},
		{"#", "a/b", true},
		{"#", "#", true},
		{"#", "+/+", true},
		{"+/#", "#", true},
		{"+/+/#", "#", false},
		{"a/+/#", "a/#", false}, // a itself
		{"+/b/#", "a/b/c", true},
		{"#", "$SYS/#", false},
		{"+/x", "$SYS/x", false},
		{"$SYS/#", "$SYS/x", true},
		{"fl/n/#", "fl/n/desired/#", true},
		{"fl/n/#", "fl/n", true},
		{"fl/n/#", "fl/+/desired/#", false},
		{"fl/n/#", "fl/n2/#", false},
		{"fl/n/#", "#", false},
		{"fl/n/#", "", false},
	} {
		if got := tc.f.Covers(tc.g); got != tc.want {
			t.Errorf("%q.Covers(%q) = %t", tc.f, tc.g, got)
		}
	}
}

func TestPrefix(t *testing.T) {
	for f, want := range map[topic.Filter]string{
		"": "", "a/b": "a/b", "#": "", "+": "", "+/a": "", "a/#": "a", "a/b/#": "a/b", "a/+": "a/", "a/+/b/#": "a/", "/#": "", "/+": "/",
	} {
		if got := f.Prefix(); got != want {
			t.Errorf("%q.Prefix() = %q, want %q", f, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, b := range built {
		f.Add(b.want)
	}
	for _, s := range []string{"", "fl", "fl/n/event//", "fl/n/desired/digest/", "fl/n/set/a/b/c/d"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := topic.Parse(s)
		if err != nil {
			if !errors.Is(err, topic.ErrForeign) {
				t.Fatalf("Parse(%q): %v is not ErrForeign", s, err)
			}
			return
		}
		if string(p.Topic()) != s {
			t.Fatalf("Parse(%q).Topic() = %q", s, p.Topic())
		}
		if strings.ContainsAny(s, "+#\x00") {
			t.Fatalf("Parse(%q) took a wildcard or a zero byte", s)
		}
		if !topic.Owned(s) || !topic.OfKind(p.Node, p.Kind).Match(topic.Topic(s)) {
			t.Fatalf("%q is not selected by its own kind", s)
		}
	})
}

// validFilter is [MQTT-4.7.1-1] and [MQTT-4.7.1-2]: wildcards stand alone in
// their level, # in the last one.
func validFilter(s string) bool {
	levels := strings.Split(s, "/")
	for i, l := range levels {
		if strings.Contains(l, "+") && l != "+" || strings.Contains(l, "#") && (l != "#" || i != len(levels)-1) {
			return false
		}
	}
	return s != ""
}

// matches is Match written as the specification reads, level by level.
func matches(filter, name string) bool {
	fs, ns := strings.Split(filter, "/"), strings.Split(name, "/")
	if strings.HasPrefix(name, "$") && (fs[0] == "+" || fs[0] == "#") {
		return false
	}
	for i, f := range fs {
		switch {
		case f == "#":
			return true
		case i >= len(ns):
			return false
		case f != "+" && f != ns[i]:
			return false
		case i == len(ns)-1 && i == len(fs)-2 && fs[i+1] == "#":
			return true
		}
	}
	return len(fs) == len(ns)
}

func FuzzMatch(f *testing.F) {
	f.Add("fl/+/reported/#", "fl/#", "fl/n/reported/node")
	f.Add("+/#", "#", "$SYS/a")
	f.Add("a/+", "a/#", "a/")
	f.Fuzz(func(t *testing.T, filter, other, name string) {
		if !validFilter(filter) || !validFilter(other) || name == "" || strings.ContainsAny(name, "+#") {
			t.Skip("not two filters and a topic")
		}
		got := topic.Filter(filter).Match(topic.Topic(name))
		if got != matches(filter, name) {
			t.Fatalf("%q.Match(%q) = %t", filter, name, got)
		}
		if got && !strings.HasPrefix(name, topic.Filter(filter).Prefix()) {
			t.Fatalf("%q selects %q, which lacks its prefix %q", filter, name, topic.Filter(filter).Prefix())
		}
		if topic.Filter(other).Covers(topic.Filter(filter)) && got && !matches(other, name) {
			t.Fatalf("%q covers %q but does not select %q", other, filter, name)
		}
	})
}
